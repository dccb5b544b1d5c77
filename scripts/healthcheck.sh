#!/usr/bin/env bash
# For cron: look at a swarm's health, and say so where its verdict is another than at the last look.
#
#   */5 * * * * HEALTH_WEBHOOK=https://... /path/to/scripts/healthcheck.sh --initial-peers /ip4/...
#
# Arguments are those of `petals-eval health`. Ends with its exit code: 0 healthy, 1 degraded, 2 a wrong flag,
# 3 broken, unknown or unreachable; or 75 where the last look is still under way.
#
# HEALTH_WEBHOOK        where to POST {"text", "verdict", "before", "exit_code", "report"} as JSON (needs curl)
# HEALTH_MAIL           whom to send a mail (needs a `mail` command, or HEALTH_MAIL_COMMAND)
# HEALTH_MAIL_COMMAND   called with -s SUBJECT ADDRESS and the text on stdin. Default: mail
# HEALTH_STATE          file that keeps the verdict. Default: ~/.cache/petals-eval/health-verdict
# PETALS_EVAL           the command. Default: .venv/bin/petals-eval beside this script, or petals-eval on the PATH
#
# Where a change cannot be told, the old verdict is kept, and the next look tries again.
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
petals_eval="${PETALS_EVAL:-}"
if [[ -z "$petals_eval" ]]; then
  petals_eval="$here/.venv/bin/petals-eval"
  [[ -x "$petals_eval" ]] || petals_eval="petals-eval"
fi
state="${HEALTH_STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/petals-eval/health-verdict}"
mkdir -p "$(dirname "$state")" || exit 4

# One look at a time: cron does not wait for a slow one.
exec 9>"$state.lock" || exit 4
flock -n 9 || exit 75

work="$(mktemp -d)" || exit 4
trap 'rm -rf "$work"' EXIT
"$petals_eval" health --json "$@" >"$work/report" 2>"$work/errors"
code=$?
case $code in
  0) verdict=healthy ;;
  1) verdict=degraded ;;
  2) cat "$work/errors" >&2; exit 2 ;;
  3) verdict=broken
     # A swarm that cannot be reached leaves no report; one that was not asked enough is unknown.
     if [[ ! -s "$work/report" ]]; then verdict=unreachable
     elif grep -qE '^\{"schema_version": [0-9]+, "time": [^,]+, "seconds": [^,]+, "level": "[a-z]+", "verdict": "unknown"' "$work/report"
     then verdict=unknown; fi ;;
  *) cat "$work/errors" >&2; exit "$code" ;;
esac
before="$(cat "$state" 2>/dev/null || echo none)"
[[ "$verdict" == "$before" ]] && exit "$code"

text="swarm health on $(hostname): $before -> $verdict"
[[ -s "$work/report" ]] || echo null >"$work/report"
told=0
if [[ -n "${HEALTH_WEBHOOK:-}" ]]; then
  # The words here are this script's own, the hostname apart; the report is JSON already.
  printf '{"text": "%s", "verdict": "%s", "before": "%s", "exit_code": %d, "report": %s}\n' \
    "${text//[^a-zA-Z0-9 .:>_-]/_}" "$verdict" "${before//[^a-z]/}" "$code" "$(cat "$work/report")" >"$work/body"
  curl --fail --silent --show-error --max-time 30 --retry 2 -H 'Content-Type: application/json' \
    --data-binary @"$work/body" "$HEALTH_WEBHOOK" >/dev/null || told=1
fi
if [[ -n "${HEALTH_MAIL:-}" ]]; then
  { echo "$text"; cat "$work/errors"; cat "$work/report"; } \
    | "${HEALTH_MAIL_COMMAND:-mail}" -s "$text" "$HEALTH_MAIL" || told=1
fi
if [[ -z "${HEALTH_WEBHOOK:-}${HEALTH_MAIL:-}" ]]; then echo "$text"; fi
if [[ $told -eq 0 ]]; then
  printf '%s\n' "$verdict" >"$state.new" && mv "$state.new" "$state"
else
  echo "could not tell of the change ($text): trying again at the next look" >&2
fi
exit "$code"
