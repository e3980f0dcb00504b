# The virtual environment of the repository's scripts, which source this file in the root folder.
# VENV=folder    where it is, made when it is not there yet (default .venv)
# PYTHON=command what makes it (default python3)
# SKIP_INSTALL=1 none: the python that is active serves as it is

# use_venv [arguments of pip install]: makes or reuses the environment, installs, activates it
use_venv() {
  local venv=${VENV:-.venv} python=${PYTHON:-python3}
  if [ "${SKIP_INSTALL:-0}" != 0 ]; then
    need_python python "activate an environment that has it, or run without SKIP_INSTALL"
    return
  fi
  if "$venv/bin/python" -c "import pip" 2>/dev/null; then
    need_python "$venv/bin/python" "delete $venv and run again"
  else  # there is none, or one that was left half made
    need_python "$python" "get it from python.org or by conda create -n robo python=3.12; if python3 \
is not its name, give that: PYTHON=python3.12 bash $0"
    # Debian and Ubuntu leave out of Python what puts pip into a new environment.
    "$python" -c "import venv, ensurepip" 2>/dev/null ||
      stop "the venv module of $python is not installed; get it: apt install python$(version "$python")-venv"
    "$python" -m venv "$venv" || stop "$python could not make $venv (said above); \
name another folder: VENV=folder bash $0"
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  source "$venv/bin/activate"
}

# need_python COMMAND CURE: stops the script unless the command is a Python of 3.11 or newer
need_python() {
  "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null ||
    stop "Python 3.11 or newer is needed, and $1 is $(version "$1"); $2"
}

version() {
  "$1" -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>/dev/null || echo "not there"
}

stop() {
  echo "error: $*" >&2
  exit 1
}
