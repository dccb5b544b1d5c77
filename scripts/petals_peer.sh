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

wanted="$(cat constraints-petals.txt scripts/petals_peer.sh | cksum)"
if ! is_done "$folder/installed" "$wanted"; then
  printf 'Installing petals 2.2.0 into %s (the first time this takes some minutes)\n' "$folder" >&2
  new_environment "$folder"
  install_pinned setuptools torch numpy hivemind transformers tokenizers accelerate huggingface-hub tensor-parallel \
    humanfriendly async-timeout speedtest-cli sentencepiece peft Dijkstar cpufeature bitsandbytes
  # Without its dependencies, which are those above: it pins a hivemind that does not build today.
  install_pinned --no-deps petals
  printf '%s\n' "$wanted" >"$folder/installed"
fi

flat_hivemind "$folder"

wanted="$({ pwd && cat pyproject.toml; } | cksum)"
if ! is_done "$folder/installed-petals-eval" "$wanted"; then
  install_pinned --no-build-isolation --editable .
  without_triton "$folder"
  "$folder/bin/python" -W ignore -c 'import bitsandbytes, petals.cli.run_server, petals_eval' ||
    fail "petals or petals_eval cannot be imported in $folder (see above)."
  printf '%s\n' "$wanted" >"$folder/installed-petals-eval"
fi
printf 'petals 2.2.0: %s\n' "$folder/bin/python" >&2
