#!/usr/bin/env bash
# The whole of RoboAlign on Tabletop: data -> FAST -> SFT -> GRPO -> three action heads -> the table.
# A fresh machine with Python 3.11+ and two CPU cores is enough; with a GPU the same script uses it.
set -euo pipefail
cd "$(dirname "$0")"
RUN=${RUN:-runs/speedrun} DATA=${DATA:-data/speedrun} SEED=${SEED:-0} RESULT=results/speedrun.json

if [ -z "${SKIP_INSTALL:-}" ]; then
  [ -d .venv ] || python3 -m venv .venv
  .venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
  source .venv/bin/activate
fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
SECONDS=0
say() { echo; echo "== $SECONDS s: $*"; }
mkdir -p "$RUN" results
if [ -e "$RUN/done" ] || [ -e "$DATA" ]; then
  echo "error: $RUN or $DATA is from an earlier run; delete them or set RUN and DATA"; exit 1
fi
rm -f "$RESULT"
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
ranks=$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)
many() { torchrun --standalone --nproc_per_node "$ranks" "$@"; }
arms=(base SFT SFT+RL)
checkpoint() { case $1 in base) echo assets/tiny-vlm;; SFT) echo "$RUN/sft";; *) echo "$RUN/grpo";; esac; }
each() {  # runs a line of shell for all arms side by side; one that fails stops the script
  local jobs=()
  for arm in "${arms[@]}"; do eval "$1" & jobs+=($!); done
  for job in "${jobs[@]}"; do wait "$job" || return 1; done
}

# torch multiplies with MKL, which runs AMD processors at about half of their speed unless its check
# of the vendor is answered with yes. Without a C compiler the run is only slower.
if [ "$gpus" = 0 ] && grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null && command -v cc >/dev/null; then
  echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' | cc -shared -fPIC -x c -o "$RUN/mkl.so" -
  export LD_PRELOAD=$(realpath "$RUN/mkl.so")
fi

say "demonstrations and conversations"
python -m benchmarks.tabletop --out "$DATA/train" --episodes 1600 --conversations 3000 --single --thought-actions 3000 --seed $SEED
python -m benchmarks.tabletop --out "$DATA/test" --episodes 120 --conversations 0 --seed 1000

say "FAST tokenizer"
python fast_tokenizer.py fit --data "$DATA/train" --out "$RUN/fast" --horizon 5 --scale 1 --vocab 18 --limit 400

say "stage 1: SFT"
many sft.py speedrun --data "$DATA/train/conversations.jsonl:0.5,$DATA/train/episodes:3,$DATA/train/thought_actions.jsonl:0.4" \
  --fast "$RUN/fast" --out "$RUN/sft" --seed $SEED

say "stage 2: GRPO"
many grpo.py speedrun --init "$RUN/sft" --data "$DATA/train/episodes" --out "$RUN/grpo" --seed $SEED

say "held-out action tokens of base, SFT and SFT+RL"
each 'python evaluate.py actions --policy "$(checkpoint $arm)" --fast "$RUN/fast" --data "$DATA/test" --arm "$arm" \
  --out "$RESULT" --preset speedrun --seed $SEED'

say "stage 3: an action head on each of the three, frozen; logs in $RUN/vla"
mkdir -p "$RUN/vla"
head='vla.py speedrun --init "$(checkpoint $arm)" --data "$DATA/train/episodes" --out "$RUN/vla/$arm" --seed $SEED'
if [ "$gpus" -gt 0 ]; then for arm in "${arms[@]}"; do eval "many $head"; done
else each "python $head"' > "$RUN/vla/$arm.txt" 2>&1' || { tail -n 2 "$RUN"/vla/*.txt; exit 1; }
fi  # on CPU side by side: no waiting for another rank
rm -rf "$RUN"/vla/*/features

say "closed loop of the three heads"
each 'python evaluate.py tabletop --policy "$RUN/vla/$arm" --arm "$arm" --out "$RESULT" \
  --preset speedrun --seed $SEED --execute 2 --trials 5 --chains 50 --gif "$RUN/gif/$arm"'

minutes=$(python -c "print(round($SECONDS / 60, 1))")
say "results"
python evaluate.py report "$RESULT" --arms base,SFT,SFT+RL --minutes "$minutes" --markdown results/speedrun.md
say "done in $minutes minutes"
touch "$RUN/done"
