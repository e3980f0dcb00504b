#!/usr/bin/env bash
# The whole of RoboAlign on Tabletop: data -> FAST -> SFT -> GRPO -> three action heads -> the table.
# A fresh machine with Python 3.11+ and two CPU cores is enough; with a GPU the same script uses it.
set -euo pipefail
cd "$(dirname "$0")"
RUN=${RUN:-runs/speedrun} DATA=${DATA:-data/speedrun} SEED=${SEED:-0}

if [ -z "${SKIP_INSTALL:-}" ]; then
  [ -d .venv ] || python3 -m venv .venv
  .venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
  source .venv/bin/activate
fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
start=$(date +%s)
say() { echo; echo "== $(( $(date +%s) - start )) s: $*"; }
RESULT=results/speedrun.json
mkdir -p "$RUN" results
if [ -e "$RUN/done" ] || [ -e "$DATA" ]; then
  echo "error: $RUN or $DATA is from an earlier run; delete them or set RUN and DATA"; exit 1
fi
rm -f "$RESULT"
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
ranks=$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)
many() { torchrun --standalone --nproc_per_node "$ranks" "$@"; }

say "demonstrations and conversations"
python -m benchmarks.tabletop --out "$DATA/train" --episodes 1600 --conversations 6000 --thought-actions 1500 --seed $SEED
python -m benchmarks.tabletop --out "$DATA/test" --episodes 120 --conversations 0 --seed 1000

say "FAST tokenizer"
python fast_tokenizer.py fit --data "$DATA/train" --out "$RUN/fast" --horizon 5 --scale 1.5 --vocab 48 --limit 400

say "stage 1: SFT"
many sft.py speedrun --data "$DATA/train/conversations.jsonl:1,$DATA/train/episodes:3,$DATA/train/thought_actions.jsonl:0.4" \
  --fast "$RUN/fast" --out "$RUN/sft" --seed $SEED

say "stage 2: GRPO"
many grpo.py speedrun --init "$RUN/sft" --data "$DATA/train/episodes" --out "$RUN/grpo" --seed $SEED

for arm in base sft grpo; do
  init=$([ $arm = base ] && echo assets/tiny-vlm || echo "$RUN/$arm")
  name=$(case $arm in base) echo base;; sft) echo SFT;; grpo) echo SFT+RL;; esac)
  say "$name: held-out action tokens"
  python evaluate.py actions --policy "$init" --fast "$RUN/fast" --data "$DATA/test" --arm "$name" \
    --out "$RESULT" --preset speedrun --seed $SEED
  say "stage 3: action head on the frozen $name"
  many vla.py speedrun --init "$init" --data "$DATA/train/episodes" --out "$RUN/vla-$arm" --seed $SEED
  rm -rf "$RUN/vla-$arm/features"
  say "$name: closed loop"
  python evaluate.py tabletop --policy "$RUN/vla-$arm" --arm "$name" --out "$RESULT" \
    --preset speedrun --seed $SEED --trials 5 --chains 50 --gif "$RUN/gif-$arm"
done

say "results"
python evaluate.py report "$RESULT" --markdown results/speedrun.md
say "done"
touch "$RUN/done"
