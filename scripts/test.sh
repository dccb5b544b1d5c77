#!/usr/bin/env bash
# Set up on a fresh machine, then run the linter, the type checker, the contracts of who imports whom, and the tests.
# Arguments go to pytest. Every step runs; the script fails if one of them does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

set_up "[test]"
failed=()
.venv/bin/python -m ruff check . || failed+=("ruff check")
.venv/bin/python -m ruff format --check . || failed+=("ruff format --check")
.venv/bin/python -m mypy || failed+=(mypy)
.venv/bin/lint-imports || failed+=(lint-imports)

# Real Petals servers and clients, in an environment of their own, for tests/interop.
scripts/petals_peer.sh || failed+=(scripts/petals_peer.sh)

# One process, and one thread of arithmetic in each: the tests start swarms of processes and measure deadlines. Threads
# that wait for each other on a machine with fewer cores than processes made the same tests take four times as long.
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest "$@" || failed+=(pytest)

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
