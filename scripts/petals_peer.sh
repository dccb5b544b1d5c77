#!/usr/bin/env bash
# Make an environment with the real Petals 2.2.0 beside the project's own: for the interop tests, and for evaluating a
# live Petals model.
#
#   scripts/petals_peer.sh [FOLDER]       FOLDER: .venv-petals in this checkout if not given
#
# All of it is pinned in constraints-petals.txt (tested with Python 3.11 on Linux x86-64). It takes minutes the first time
# and a moment when there is nothing to do. petals_eval is installed from this checkout: edits to it show there at once.
set -euo pipefail
folder="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../.venv-petals}")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

install_pinned() {
  "$folder/bin/python" -m pip install --quiet -c constraints-petals.txt "$@" >&2 ||
    fail "the packages could not be installed (see pip's message above)." "What was downloaded is kept: run this again."
}

is_done() { # STAMP WANTED
  [ -f "$1" ] && [ "$(cat "$1")" = "$2" ] && "$folder/bin/python" -c ''
}

wanted="$(cat constraints-petals.txt scripts/petals_peer.sh | cksum)"
if ! is_done "$folder/installed" "$wanted"; then
  check_platform
  if [ -n "$(ls -A "$folder" 2>/dev/null)" ] && [ ! -f "$folder/pyvenv.cfg" ]; then
    fail "$folder holds something else than a Python environment." "Name an empty or a new folder."
  fi
  # cpufeature, which Petals needs, has a wheel for no later Python.
  export PYTHON="${PYTHON:-python3.11}"
  python="$(find_python)" || exit
  printf 'Installing petals 2.2.0 into %s (the first time this takes some minutes)\n' "$folder" >&2
  # Moved out of the way at once: an environment half removed would not be known for one any more.
  rm -rf "$folder.old"
  [ ! -d "$folder" ] || mv "$folder" "$folder.old"
  rm -rf "$folder.old"
  "$python" -m venv "$folder" >&2 || fail "$python could not make the environment $folder (see above)."
  install_pinned setuptools torch numpy hivemind transformers tokenizers accelerate huggingface-hub tensor-parallel \
    humanfriendly async-timeout speedtest-cli sentencepiece peft Dijkstar cpufeature bitsandbytes
  # Without its dependencies, which are those above: it pins a hivemind that does not build today.
  install_pinned --no-deps petals
  printf '%s\n' "$wanted" >"$folder/installed"
fi

# hivemind's old flat namespace for every Python process of this environment: each runs the .pth file's line at its start.
packages="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
install -m 644 petals_eval/integrations/hivemind_flat.py "$packages/"
printf 'import hivemind_flat\n' >"$packages/hivemind_flat.pth"

wanted="$({ pwd && cat pyproject.toml; } | cksum)"
if ! is_done "$folder/installed-petals-eval" "$wanted"; then
  install_pinned --no-build-isolation --editable .
  # Where pip takes torch's CUDA build, a triton comes with it that Petals' old bitsandbytes fails to import: a server would
  # announce itself and die. Nothing here uses it, and bitsandbytes does without.
  "$folder/bin/python" -m pip uninstall --quiet --yes triton >&2
  "$folder/bin/python" -W ignore -c 'import bitsandbytes, petals.cli.run_server, petals_eval' ||
    fail "petals or petals_eval cannot be imported in $folder (see above)."
  printf '%s\n' "$wanted" >"$folder/installed-petals-eval"
fi
printf 'petals 2.2.0: %s\n' "$folder/bin/python" >&2
