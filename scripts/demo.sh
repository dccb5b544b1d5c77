#!/usr/bin/env bash
# Set up on a fresh machine, then evaluate the shipped prompts over a swarm of three servers on this machine.
# Arguments go to `petals-eval demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

set_up ""
exec .venv/bin/petals-eval demo "$@"
