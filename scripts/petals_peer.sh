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

wanted="$({ pwd && cat pyproject.toml constraints-petals.txt scripts/petals_peer.sh; } | cksum)"
stamp="$folder/installed"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ] || ! "$folder/bin/python" -c ''; then
  check_platform
  if [ -n "$(ls -A "$folder" 2>/dev/null)" ] && [ ! -f "$folder/pyvenv.cfg" ]; then
    fail "$folder holds something else than a Python environment." "Name an empty or a new folder."
  fi
  export PYTHON="${PYTHON:-python3.11}"
  python="$(find_python)" || exit
  printf 'Installing petals 2.2.0 into %s (the first time this takes some minutes)\n' "$folder" >&2
  "$python" -m venv --clear "$folder" >&2 || fail "$python could not make the environment $folder (see above)."
  install_pinned setuptools
  # First what Petals needs and then what petals_eval needs, in one call, so that pip sees what they ask of each other.
  install_pinned torch numpy hivemind transformers tokenizers accelerate huggingface-hub tensor-parallel humanfriendly \
    async-timeout speedtest-cli sentencepiece peft Dijkstar cpufeature bitsandbytes \
    anyio datasets pandas pyarrow pydantic pyyaml rich safetensors scikit-learn typer
  # Without dependencies: petals pins a hivemind that does not build today.
  install_pinned --no-deps petals
  install_pinned --no-deps --no-build-isolation --editable .
fi

# hivemind's old flat namespace for every Python process of this environment: each runs the .pth file's line at its start.
packages="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
install -m 644 tests/interop/hivemind_flat.py "$packages/"
printf 'import hivemind_flat\n' >"$packages/hivemind_flat.pth"

if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  # Only an environment in which both can be imported counts as done.
  "$folder/bin/python" -W ignore -c 'import petals.cli.run_server, petals_eval' ||
    fail "petals or petals_eval cannot be imported in $folder (see above)."
  printf '%s\n' "$wanted" >"$stamp"
fi
printf 'petals 2.2.0: %s\n' "$folder/bin/python" >&2
