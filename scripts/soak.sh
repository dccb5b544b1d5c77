#!/usr/bin/env bash
# What takes longer than every change should wait for: all cases of tests that otherwise run a sample of theirs, hundreds of
# seeded schedules of faults, a hundred thousand in virtual time, and hundreds of kills. Half a day on two cores. SOAK_SEED draws other schedules and moments.
# Every step runs; the script fails if one of them does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

set_up "[test]"
scripts/petals_peer.sh
scripts/trackers_environment.sh
export CI=true OMP_NUM_THREADS=1
seed="${SOAK_SEED:-0}"
failed=()

.venv/bin/python -m pytest --soak --timeout 3600 --client-kills 30 --client-seed "$seed" --session-kills 200 \
  --session-seed "$seed" --server-absence 60 || failed+=(pytest)
# The wheel with all that it needs, in an environment where nothing else is, far from the checkout.
try_packages() {
  local folder
  folder="$(mktemp -d)" && build_packages "$folder" && new_environment "$folder/environment" &&
    "$folder/environment/bin/python" -m pip install -c constraints.txt "$folder"/*.whl &&
    (cd "$folder" && environment/bin/petals-eval demo) && rm -rf "$folder"
}
(try_packages) || failed+=("the wheel in an environment of its own")
.venv/bin/python scripts/noise_coverage.py || failed+=(scripts/noise_coverage.py)
.venv/bin/petals-eval bench simulate --faults 100000 --seed "$seed" || failed+=("bench simulate")
.venv/bin/python scripts/chaos.py --schedules 200 --seed "$seed" --jobs 2 || failed+=(scripts/chaos.py)

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
