#!/usr/bin/env bash
# Make an environment with the trackers that results can be logged to, beside the project's own (scripts/test.sh), whose
# packages it sees: for tests/tracking, which otherwise tries TensorBoard alone.
#
#   scripts/trackers_environment.sh [FOLDER]       FOLDER: .venv-trackers in this checkout if not given
set -euo pipefail
folder="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../.venv-trackers}")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

packages=(mlflow-skinny==3.17.2 trackio==0.43.0 wandb==0.31.0)
wanted="$({ printf '%s\n' "$PWD" "${packages[@]}" && cat scripts/trackers_environment.sh constraints.txt; } | cksum)"
if ! is_done "$folder/installed" "$wanted"; then
  printf 'Installing %s into %s\n' "${packages[*]}" "$folder" >&2
  new_environment "$folder"
  site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
  site .venv/bin/python >"$(site "$folder/bin/python")/petals-eval.pth"
  # trackio wants pillow below 13, which is what matplotlib takes beside it.
  "$folder/bin/python" -m pip install --quiet -c <(grep -v '^pillow==' constraints.txt) "${packages[@]}" >&2 ||
    fail "the packages could not be installed (see pip's message above)." "What was downloaded is kept: run this again."
  printf '%s\n' "$wanted" >"$folder/installed"
fi
printf 'trackers: %s\n' "$folder/bin/python" >&2
