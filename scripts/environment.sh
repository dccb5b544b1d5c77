# The environments of scripts/demo.sh, scripts/test.sh and those with servers, and the packages: sourced by them, in the root of the checkout.
# Everything goes to stderr: stdout belongs to the command that is run.

fail() {
  printf 'error: %s\n' "$1" >&2
  shift
  [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
  exit 4
}

# Python 3.11 comes first because the pins in constraints.txt were tested with it.
find_python() {
  local candidate
  # Each one is run, not just looked up: version managers leave names on the PATH that do not work.
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "no Python from 3.11 was found (tried: ${PYTHON:-python3.11 python3.12 python3.13 python3})." \
    "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv), or name it: PYTHON=/path/to/python $0"
}

# hivemind's wheels carry its libp2p daemon; on macOS on x86-64 it is torch that there is no wheel of.
check_platform() {
  local system
  system="$(uname -s) $(uname -m)"
  case "$system" in
    "Linux x86_64" | "Linux aarch64" | "Darwin arm64") ;;
    "Darwin x86_64") fail "macOS on x86-64 has no torch from 2.5 on (its last wheel there is 2.2.2): use another machine." ;;
    *) fail "this is $system; expected Linux on x86-64 or aarch64, or macOS on arm64." "On Windows use WSL." ;;
  esac
}

# set_up EXTRAS: make .venv with this checkout in it, with EXTRAS ("" or "[test]"). Does nothing when that is done:
# a stamp holds what was installed (this folder, pyproject.toml, constraints.txt). "[test]" holds all of "".
set_up() {
  local wanted stamp python
  wanted="$({ pwd && cat pyproject.toml constraints.txt; } | cksum)"
  for stamp in ".venv/installed$1" ".venv/installed[test]"; do
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && .venv/bin/python -c ''; then
      return
    fi
  done

  .venv/bin/python -c 'import hivemind.p2p' 2>/dev/null || check_platform
  # Not `pip --version` alone: an interrupted set-up, or a Python that is gone, leaves a .venv that cannot be used.
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)" || exit
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$python has no venv module." "Install it (Debian, Ubuntu: apt install python3-venv) and run this again."
    "$python" -m venv --clear .venv >&2 || fail "$python could not make the environment $PWD/.venv (see above)."
  fi
  printf 'Installing petals-eval%s into .venv (the first time this takes some minutes)\n' "$1" >&2
  .venv/bin/python -m pip install -c constraints.txt --config-settings editable_mode=compat -e ".$1" >&2 ||
    fail "the packages could not be installed (see pip's message above)." "What was downloaded is kept: run this again."
  printf '%s\n' "$wanted" >".venv/installed$1"
}

# build_packages FOLDER: make the sdist, and out of that the wheel, with the setuptools that .venv has: nothing is downloaded.
build_packages() {
  .venv/bin/python -c 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])' "$1" >&2 &&
    .venv/bin/python -m pip wheel --no-deps --no-build-isolation --no-index --wheel-dir "$1" "$1"/*.tar.gz >&2
}

# new_environment FOLDER: make an empty environment there, in the place of one that is there.
new_environment() {
  local python
  check_platform
  if [ -n "$(ls -A "$1" 2>/dev/null)" ] && [ ! -f "$1/pyvenv.cfg" ]; then
    fail "$1 holds something else than a Python environment." "Name an empty or a new folder."
  fi
  # cpufeature, which the servers need, has a wheel for no later Python.
  export PYTHON="${PYTHON:-python3.11}"
  python="$(find_python)" || exit
  if [ -e "$1.old" ] && [ ! -f "$1.old/pyvenv.cfg" ]; then
    fail "$1.old, where an old environment is moved to, holds something else." "Move it, or name another folder."
  fi
  # Moved out of the way at once: an environment half removed would not be known for one any more.
  rm -rf "$1.old"
  [ ! -d "$1" ] || mv "$1" "$1.old"
  rm -rf "$1.old"
  "$python" -m venv "$1" >&2 || fail "$python could not make the environment $1 (see above)."
}

# is_done STAMP WANTED: whether the stamp, a file in an environment that still runs, says that this was installed.
is_done() {
  [ -f "$1" ] && [ "$(cat "$1")" = "$2" ] && "$(dirname "$1")/bin/python" -c ''
}

# flat_hivemind FOLDER: hivemind's old flat namespace for every Python process of an environment: each runs the .pth file's
# line at its start.
flat_hivemind() {
  local packages
  packages="$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  install -m 644 petals_eval/integrations/hivemind_flat.py "$packages/"
  printf 'import hivemind_flat\n' >"$packages/hivemind_flat.pth"
}

# without_triton FOLDER: where pip takes torch's CUDA build, a triton comes with it that Petals' old bitsandbytes fails to
# import: a server would announce itself and die. No server here uses it, and bitsandbytes does without.
without_triton() {
  "$1/bin/python" -m pip uninstall --quiet --yes triton >&2
}
