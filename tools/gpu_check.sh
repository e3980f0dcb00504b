#!/usr/bin/env bash
# What only a GPU can answer, in one call of under ten minutes: see tools/gpu_check.py.
#   bash tools/gpu_check.sh [--out FILE] [--cpu]
# Needs nothing but this repository and a Python that has its requirements: the active one, or
# VENV (default .venv). No network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python
if [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x "$python" ]; then
  python=python
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec timeout 600 "$python" -m tools.gpu_check "$@"
