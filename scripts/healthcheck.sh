#!/usr/bin/env bash
# For cron: look at a swarm's health, and say so where its verdict is another than at the last look.
#
#   */5 * * * * HEALTH_WEBHOOK=https://... /path/to/scripts/healthcheck.sh --initial-peers /ip4/...
#
# Arguments are those of `petals-eval health`, for one look. Ends with its exit code: 0 healthy, 1 degraded, 2 a wrong
# flag, 3 broken, unknown or unreachable; or 70 where there is no report that can be read, and 75 where the last look is
# still under way. What is healthy is said by a report alone.
#
# HEALTH_WEBHOOK        where to POST {"text", "verdict", "before", "exit_code", "report"} as JSON (needs curl)
# HEALTH_MAIL           whom to send a mail (needs a `mail` command, or HEALTH_MAIL_COMMAND)
# HEALTH_MAIL_COMMAND   called with -s SUBJECT ADDRESS and the text on stdin. Default: mail
# HEALTH_STATE          where verdicts are kept: a file for each swarm, which is this name with a hash of the arguments
#                       behind it. Default: ~/.cache/petals-eval/health-verdict
# PETALS_EVAL           the command. Default: .venv/bin/petals-eval beside this script, or petals-eval on the PATH
#
# Where a change cannot be told, the old verdict is kept, and the next look tries again.
set -uo pipefail

for argument in "$@"; do
  case $argument in
    -h | --help) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --watch | --serve | --serve=*) echo "$argument goes on looking: this looks once, leave it out" >&2; exit 2 ;;
  esac
done

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
petals_eval="${PETALS_EVAL:-}"
if [[ -z "$petals_eval" ]]; then
  petals_eval="$here/.venv/bin/petals-eval"
  [[ -x "$petals_eval" ]] || petals_eval="petals-eval"
fi
swarm="$(printf '%s\0' "$@" | sha256sum | cut -c1-16)"
state="${HEALTH_STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/petals-eval/health-verdict}-$swarm"
mkdir -p "$(dirname "$state")" || exit 4

# One look at a time: cron does not wait for a slow one.
exec 9>"$state.lock" || exit 4
flock -n 9 || exit 75

work="$(mktemp -d)" || exit 4
trap 'rm -rf "$work"' EXIT
"$petals_eval" health --json "$@" >"$work/report" 2>"$work/errors"
code=$?
# The report's first keys are ours; words of strangers come behind them.
verdict="$(sed -nE 's/^\{"schema_version": [0-9]+, "time": [^,]+, "seconds": [^,]+, "level": "[a-z]+", "verdict": "([a-z]+)", .*\}$/\1/p' "$work/report")"
# A swarm that cannot be reached leaves no report at all.
if [[ $code -eq 3 && ! -s "$work/report" ]]; then verdict=unreachable; fi
case $code-$verdict in
  0-healthy | 1-degraded | 3-broken | 3-unknown | 3-unreachable) ;;
  0-* | 1-* | 3-*)
    cat "$work/errors" >&2
    echo "petals-eval health ended with $code, and its report says ${verdict:-nothing}: no verdict" >&2
    exit 70 ;;
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
    | "${HEALTH_MAIL_COMMAND:-mail}" -s "$text" "$HEALTH_MAIL" 9>&- || told=1  # a mailer that stays must not keep the lock
fi
if [[ -z "${HEALTH_WEBHOOK:-}${HEALTH_MAIL:-}" ]]; then echo "$text"; fi
if [[ $told -eq 0 ]]; then
  printf '%s\n' "$verdict" >"$state.new" && mv "$state.new" "$state"
else
  echo "could not tell of the change ($text): trying again at the next look" >&2
fi
exit "$code"
