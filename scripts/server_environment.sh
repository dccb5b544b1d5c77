#!/usr/bin/env bash
# Make an environment with servers that people start today in the place of Petals 2.2.0, from a clone of theirs that you
# have: to hold this client against them (tests/interop), or to lend a machine of your own to a swarm.
#
#   scripts/server_environment.sh petals-main|drift|bloombee SOURCE [FOLDER]
#
#   SOURCE   a clone of bigscience-workshop/petals, ApexDevelopment/DRIFT-LLM or ai-decentralized/BloomBee. It is copied
#            and not written to. Tested: 22afba6, dd294a1 and 4479999, with Python 3.11 on Linux x86-64, on the CPU.
#   FOLDER   .venv-NAME in this checkout if not given
#
# What they pin themselves does not install together any more: these are versions that were seen working. It takes minutes
# the first time and a moment when there is nothing to do. petals_eval is installed from this checkout: edits to it show
# there at once.
set -euo pipefail
name="${1:-}"
[ -z "${2:-}" ] || source="$(realpath -m "$2")"
folder="$(realpath -m "${3:-$(dirname "${BASH_SOURCE[0]}")/../.venv-$name}")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

case "$name" in
  petals-main)
    package=petals
    pins=(numpy==1.26.4 transformers==4.43.1 tokenizers==0.19.1 huggingface-hub==0.36.2 peft==0.8.2 bitsandbytes==0.41.1
      tensor-parallel==1.0.23)
    ;;
  drift)
    package=drift
    pins=(numpy==2.4.6 transformers==5.13.1 tokenizers==0.22.2 huggingface-hub==1.33.0 peft==0.21.2 bitsandbytes==0.45.5)
    ;;
  bloombee)
    package=bloombee
    pins=(numpy==1.26.4 transformers==5.5.4 tokenizers==0.22.2 huggingface-hub==1.33.0 peft==0.21.2
      tensor-parallel==1.0.23 nvidia-ml-py==13.615.71 zstandard==0.25.0)
    ;;
  *) fail "expected petals-main, drift or bloombee, found '$name'." "scripts/server_environment.sh NAME SOURCE [FOLDER]" ;;
esac
pins+=(setuptools==84.2.1 torch==2.13.0 hivemind==1.1.12 accelerate==1.15.0 humanfriendly==10.0 async-timeout==5.0.1
  speedtest-cli==2.1.3 sentencepiece==0.2.3 requests==2.34.2 Dijkstar==2.6.0 cpufeature==0.2.1)
[ -f "${source:-}/src/$package/cli/run_server.py" ] ||
  fail "expected a clone of $name, with src/$package/cli/run_server.py in it, found ${source:-none}." \
    "scripts/server_environment.sh $name SOURCE [FOLDER]"

install_pinned() {
  "$folder/bin/python" -m pip install --quiet "$@" >&2 ||
    fail "the packages could not be installed (see pip's message above)." "What was downloaded is kept: run this again."
}

wanted="$({ pwd && cat pyproject.toml scripts/server_environment.sh; } | cksum)"
if ! is_done "$folder/installed" "$wanted"; then
  printf 'Installing what %s needs into %s (the first time this takes some minutes)\n' "$name" "$folder" >&2
  new_environment "$folder"
  install_pinned "${pins[@]}"
  install_pinned --no-build-isolation "${pins[@]}" --editable .
  without_triton "$folder"
  printf '%s\n' "$wanted" >"$folder/installed"
fi

flat_hivemind "$folder"

wanted="$(find "$source/src" -name '*.py' -type f -print0 | sort -z | xargs -0 cksum | cksum)"
if ! is_done "$folder/installed-$package" "$wanted"; then
  copy="$(mktemp -d)" # the build writes beside what it builds
  trap 'rm -rf "$copy"' EXIT
  cp -R "$source/." "$copy/"
  rm -rf "$copy/.git"
  # Without its dependencies, which are those above.
  install_pinned --no-build-isolation --no-deps --force-reinstall "$copy"
  "$folder/bin/python" -W ignore -c "import $package.cli.run_server, petals_eval" ||
    fail "$package or petals_eval cannot be imported in $folder (see above)."
  printf '%s\n' "$wanted" >"$folder/installed-$package"
fi
printf '%s: %s\n' "$name" "$folder/bin/python" >&2
