#!/usr/bin/env bash
# The whole of RoboAlign on Tabletop: data -> FAST -> SFT -> GRPO -> three action heads -> the table.
# A fresh machine with Python 3.11+ and two CPU cores is enough; with a GPU the same script uses it.
# QUICK=1 shows every stage in some five minutes, with a table that says that it is only that.
# FULL=1 takes hours: twice the data, twice the steps of SFT, ten times those of GRPO, and heads of
# four times the frames and steps.
# RESUME=1 goes on with a run that was stopped: at the stage, and with FULL=1 at the saved step.
# RUN, DATA and SEED name other folders and another seed; tools/venv.sh explains VENV, PYTHON and
# SKIP_INSTALL.
set -euo pipefail
cd "$(dirname "$0")"

source tools/venv.sh  # use_venv, stop

# ---- Sizes ----

case ${QUICK:-0},${FULL:-0} in
  0,0)
    RUN=${RUN:-runs/speedrun}
    DATA=${DATA:-data/speedrun}
    RESULT=results/speedrun.json
    preset=speedrun
    train_data=(--episodes 3200 --conversations 6000 --thought-actions 36000 --carried-on 0.5)
    test_data=(--episodes 120)
    sft=(speedrun)  # a preset of each stage, and what differs from it
    grpo=(speedrun)
    head=(speedrun)
    held_out=(--prompts 512)
    trials=(--trials 5 --chains 50)
    suites_of_tokens=spatial,object,goal,long
    note=""
    ;;
  1,0)
    RUN=${RUN:-runs/quick}
    DATA=${DATA:-data/quick}
    RESULT=$RUN/results.json
    preset=quick
    train_data=(--episodes 400 --conversations 1200 --thought-actions 2400 --carried-on 0.5)
    test_data=(--episodes 40)
    sft=(speedrun --steps 160)
    grpo=(speedrun --steps 8)
    head=(speedrun --steps 200 --max-episodes 100)
    held_out=(--prompts 128)
    trials=(--trials 1 --chains 4)
    suites_of_tokens=goal
    note="A quick look: every stage ran, none to its end; these numbers say nothing of the method."
    ;;
  0,1)
    RUN=${RUN:-runs/full}
    DATA=${DATA:-data/full}
    RESULT=results/full.json
    preset=full
    train_data=(--episodes 6400 --conversations 12000 --thought-actions 72000 --carried-on 0.5)
    test_data=(--episodes 120)
    sft=(speedrun --steps 9600 --save-every 400)
    grpo=(speedrun --steps 800 --save-every 40)
    head=(speedrun --stride 4 --steps 8800 --save-every 400)
    held_out=(--prompts 512)
    trials=(--trials 10 --chains 100)
    suites_of_tokens=spatial,object,goal,long
    note=""
    ;;
  *)
    stop "QUICK=${QUICK:-0}, FULL=${FULL:-0}; give one of them as 1, or leave both away"
    ;;
esac
SEED=${SEED:-0}
test_seed=1000
if [ "$SEED" = $test_seed ]; then
  stop "SEED=$SEED is that of the test data, which would be trained on; give another one"
fi
DATA=${DATA%/}

# ---- Set-up ----

use_venv -r requirements.txt
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
resume=
[ "${RESUME:-0}" = 0 ] || resume=--resume
if [ -z "$resume" ] && { [ -e "$RUN/ended" ] || [ -e "$DATA" ]; }; then
  stop "$RUN or $DATA is from an earlier run; RESUME=1 goes on with it; or delete both, or set others"
elif [ -n "$resume" ] && [ ! -e "$RUN/ended" ]; then
  stop "RESUME=1, and $RUN holds no run to go on with; run without it"
fi
mkdir -p "$RUN/ended" "$(dirname "$RESULT")"
SECONDS=$(cat "$RUN/seconds" 2>/dev/null || echo 0)  # bash counts on from here
trap 'echo $SECONDS > "$RUN/seconds"' EXIT
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
ranks=$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)

# torch multiplies with MKL, which runs AMD processors at about half of their speed unless its check
# of the vendor is answered with yes. Without a C compiler the run is only slower.
if [ "$gpus" = 0 ] && grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null && command -v cc >/dev/null; then
  echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' | cc -shared -fPIC -x c -o "$RUN/mkl.so" -
  export LD_PRELOAD=$(realpath "$RUN/mkl.so")
fi

# ---- What the stages below share ----

variants=(base SFT SFT+RL)  # the rows of the table

# stage FUNCTION WORDS: says the words and calls the function, unless an earlier run has ended it
stage() {
  local function=$1
  shift
  if [ ! -e "$RUN/ended/$function" ]; then
    echo
    echo "== $SECONDS s: $*"
    "$function"
    touch "$RUN/ended/$function"
    echo $SECONDS > "$RUN/seconds"
  fi
}

on_all_ranks() {
  torchrun --standalone --nproc_per_node "$ranks" "$@"
}

backbone_of() {
  case $1 in
    base) echo assets/tiny-vlm ;;
    SFT) echo "$RUN/sft" ;;
    SFT+RL) echo "$RUN/grpo" ;;
  esac
}

# side_by_side FUNCTION VARIANT...: calls it with each, all at once; one that fails fails the whole,
# when the others have ended
side_by_side() {
  local function=$1 variant job jobs=() failed=0
  shift
  for variant; do
    "$function" "$variant" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do
    wait "$job" || failed=1
  done
  return $failed
}

# ---- Data and action tokens ----

make_data() {
  rm -rf "$DATA.unfinished"  # of a run that was stopped here
  python -m benchmarks.tabletop_data --out "$DATA.unfinished/train" --seed "$SEED" \
    --single "${train_data[@]}"
  python -m benchmarks.tabletop_data --out "$DATA.unfinished/test" --seed $test_seed \
    --conversations 0 "${test_data[@]}"
  mv "$DATA.unfinished" "$DATA"
}

fit_tokenizer() {
  rm -f "$RESULT"
  python fast_tokenizer.py fit --data "$DATA/train" --out "$RUN/fast" \
    --horizon 5 --scale 2.5 --vocab-size 64 --max-episodes 400
  python evaluate.py tokens --action-tokenizer "$RUN/fast" --execute 2 --out "$RESULT" \
    --preset "$preset"
}

stage make_data "demonstrations and conversations"
stage fit_tokenizer "FAST tokenizer"

# ---- Stages 1 and 2: the backbone learns to see, to think and to act; then to think better ----

train_sft() {
  local mixture=$DATA/train/conversations.jsonl:0.5,$DATA/train/episodes:3
  mixture=$mixture,$DATA/train/thought_actions.jsonl:0.3  # 8% of the samples think, then act
  on_all_ranks sft.py "${sft[@]}" --data "$mixture" --action-tokenizer "$RUN/fast" \
    --out "$RUN/sft" --seed "$SEED" $resume
}

train_grpo() {
  on_all_ranks grpo.py "${grpo[@]}" --init "$RUN/sft" --data "$DATA/train/episodes" \
    --out "$RUN/grpo" --seed "$SEED" $resume
}

measure_action_tokens() {  # VARIANT
  python evaluate.py actions --policy "$(backbone_of "$1")" --action-tokenizer "$RUN/fast" \
    --data "$DATA/test" --variant "$1" --out "$RESULT" --preset "$preset" --seed "$SEED" \
    "${held_out[@]}"
}
measure_all_action_tokens() { side_by_side measure_action_tokens "${variants[@]}"; }

stage train_sft "stage 1: SFT"
stage train_grpo "stage 2: GRPO"
stage measure_all_action_tokens "held-out action tokens of base, SFT and SFT+RL"

# ---- Stage 3: the same action head on each of the three frozen backbones ----

train_head() {  # VARIANT COMMAND: the command is what runs vla.py
  "$2" vla.py "${head[@]}" --init "$(backbone_of "$1")" --data "$DATA/train/episodes" \
    --out "$RUN/vla/$1" --seed "$SEED" $resume
}
train_head_on_one_core() { train_head "$1" python > "$RUN/vla/$1.txt" 2>&1; }
train_heads() {
  mkdir -p "$RUN/vla"
  if [ "$gpus" -gt 0 ]; then
    for variant in "${variants[@]}"; do
      train_head "$variant" on_all_ranks
    done
  else  # on a CPU all three at once: none waits for another rank
    side_by_side train_head_on_one_core "${variants[@]}" || { tail -n 2 "$RUN"/vla/*.txt; exit 1; }
  fi
  rm -rf "$RUN"/vla/*/features
}

drive() {  # VARIANT
  python evaluate.py tabletop --policy "$RUN/vla/$1" --variant "$1" --out "$RESULT" \
    --preset "$preset" --seed "$SEED" --execute 2 "${trials[@]}" --gif "$RUN/gif/$1"
}
drive_all() { side_by_side drive "${variants[@]}"; }

drive_by_tokens() {  # VARIANT
  python evaluate.py tabletop --policy "$(backbone_of "$1")" --mode think --variant "$1" \
    --out "$RESULT" --preset "$preset" --seed "$SEED" --execute 2 "${trials[@]}" \
    --suites $suites_of_tokens --gif "$RUN/gif/$1-think"
}
drive_all_by_tokens() { side_by_side drive_by_tokens SFT SFT+RL; }  # base has no action tokens

stage train_heads "stage 3: an action head on each of the three, frozen; logs in $RUN/vla"
stage drive_all "closed loop of the three heads"
stage drive_all_by_tokens "closed loop of the models' own thoughts and action tokens"

# ---- The table ----

write_table() {
  minutes=$(python -c "print(round($SECONDS / 60, 1))")
  python evaluate.py report "$RESULT" --variants base,SFT,SFT+RL --minutes "$minutes" \
    --note "$note" --markdown "${RESULT%.json}.md"
  echo "done in $minutes minutes"
}
stage write_table "results"
