#!/usr/bin/env bash
# The tests, on a fresh machine too: bash tests/run.sh [arguments of pytest]
#   bash tests/run.sh                            all of them, some minutes on two CPU cores
#   bash tests/run.sh tests/test_grpo.py -x      one module, up to the first failure
# tools/venv.sh makes the environment; VENV, PYTHON and SKIP_INSTALL are explained there.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/venv.sh
use_venv -r requirements.txt
export OMP_NUM_THREADS=1  # several processes share the cores: more threads only slow them down
exec python -m pytest "$@"
