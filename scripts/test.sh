#!/usr/bin/env bash
# Set up on a fresh machine, then run the linter, the type checker, the contracts of who imports whom, and the tests.
# Arguments go to pytest. Every step runs; the script fails if one of them does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

# What computes numbers or tries the README's commands, and takes as long as it takes: it runs beside the rest, which
# starts swarms of processes, kills them and measures deadlines, and so has a processor to itself most of the time.
unhurried=(
  tests/bench tests/comparison tests/data tests/demo tests/docker tests/evaluation tests/faults tests/generation
  tests/hostile tests/integrations tests/metrics tests/model tests/remote_model tests/report tests/runs tests/simulator
  tests/tasks tests/tracking tests/two_modes tests/cli/test_readme.py tests/cli/test_run.py
  tests/interop/test_bench_vs_petals.py tests/interop/test_epoch_loop.py tests/interop/test_lm_eval.py
  tests/interop/test_lm_eval_texts.py tests/interop/test_petals_client_on_our_stub.py tests/test_packages.py petals_eval
)

# run_all OPTIONS: all tests, in two processes.
run_all() {
  local output existing=() rest=()
  output="$(mktemp)"
  for each in "${unhurried[@]}"; do
    [ ! -e "$each" ] || existing+=("$each") rest+=("--ignore=$each")
  done
  set -m # a process group of its own: one that is not would ignore Ctrl-C, and tests of signals with it
  nice -n 5 .venv/bin/python -m pytest -p no:cacheprovider "$@" "${existing[@]}" >"$output" 2>&1 &
  beside=$!
  set +m
  trap 'kill -INT -- "-$beside" 2>/dev/null || true' EXIT
  .venv/bin/python -m pytest "$@" "${rest[@]}" || failed+=("pytest")
  wait "$beside" || failed+=("pytest ${existing[*]}")
  trap - EXIT
  cat "$output"
  rm -f "$output"
}

set_up "[test]"
failed=()
.venv/bin/python -m ruff check . || failed+=("ruff check")
.venv/bin/python -m ruff format --check . || failed+=("ruff format --check")
.venv/bin/python -m mypy || failed+=(mypy)
.venv/bin/lint-imports || failed+=(lint-imports)

# Real Petals servers and clients, in an environment of their own, for tests/interop.
scripts/petals_peer.sh || failed+=(scripts/petals_peer.sh)

# One thread of arithmetic in each process: the tests start swarms of processes and measure deadlines. Threads that wait
# for each other on a machine with fewer cores than processes made the same tests take four times as long.
export OMP_NUM_THREADS=1
case " $*" in
  *" --cov"* | *" "[!-]*) .venv/bin/python -m pytest "$@" || failed+=(pytest) ;; # one report, or tests by name
  *) run_all "$@" ;;
esac

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
