#!/usr/bin/env bash
# Build docker/Dockerfile and run docker/compose.yaml for real on a machine without Docker. Not part of .ci/run.
#
#   scripts/build_container.sh [base|image|run|clean]...      all but clean, if none is named; what is done is kept
#
#   base   a Debian 12 made by debootstrap, as the image localhost/petals-eval-base: it stands for debian:12-slim
#   image  the Dockerfile on top of it, as localhost/petals-eval
#   run    the image alone (read-only, no network, its user): --version and the demo; then the compose file, with
#          scripts/compose_with_runc.py and Debian's Prometheus. The evaluation's metrics are on stdout
#   clean  remove the images and what was made for them
#
# It needs root, about 6 GB in /var/lib/containers, Debian's packages, and PyYAML for the Python named by PYTHON:
#   apt-get install --no-install-recommends buildah debootstrap runc iproute2
# Where packages come from, if not from the usual places:
#   MIRROR       Debian's archive                               (http://deb.debian.org/debian)
#   TORCH_INDEX  where pip looks for torch                      (the Dockerfile's)
#   PIP_CONF     a pip.conf for the build, such as your own     (none)
#   VOLUMES      HOST:CONTAINER pairs that it names, apart by blanks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BASE=localhost/petals-eval-base
IMAGE=localhost/petals-eval
PROMETHEUS=localhost/petals-eval-prometheus
PYTHON="${PYTHON:-python3}"

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 4
}

note() {
  printf '== %s\n' "$*" >&2
}

check_machine() {
  [ "$(id -u)" = 0 ] || fail "this must be run by root."
  local tool
  for tool in buildah debootstrap runc ip; do
    command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install --no-install-recommends buildah debootstrap runc iproute2"
  done
  "$PYTHON" -c 'import yaml' 2>/dev/null || fail "$PYTHON has no PyYAML: name one that has, such as PYTHON=.venv/bin/python"
}

has_image() {
  buildah inspect --type image "$1" >/dev/null 2>&1
}

# runc, because crun refuses machines where both versions of cgroups are mounted; the host's network, because a bridge of
# its own would need a firewall's kernel modules.
build() {
  buildah build --layers --runtime runc --network host --quiet "$@"
}

make_base() {
  ! has_image "$BASE" || return 0
  note "debootstrap"
  local folder container
  folder="$(mktemp -d /var/tmp/petals-eval-base.XXXXXX)"
  debootstrap --variant=minbase bookworm "$folder" "${MIRROR:-http://deb.debian.org/debian}" >"$folder.log" ||
    fail "debootstrap did not end well: see $folder.log"
  rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
  container="$(buildah from scratch)"
  buildah add --quiet "$container" "$folder" / >/dev/null
  buildah commit --quiet --rm "$container" "$BASE" >/dev/null
  rm -rf "$folder" "$folder.log"
}

make_image() {
  make_base
  note "docker/Dockerfile"
  local options=(--build-arg "BASE=$BASE") volume
  [ -z "${TORCH_INDEX:-}" ] || options+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
  [ -z "${PIP_CONF:-}" ] || options+=(--volume "$(realpath "$PIP_CONF"):/etc/pip.conf:ro")
  for volume in ${VOLUMES:-}; do
    options+=(--volume "$volume:ro")
  done
  build "${options[@]}" --file docker/Dockerfile --tag "$IMAGE" . >/dev/null
  # For the run alone: what docker.io/prom/prometheus is in the compose file.
  build --build-arg "BASE=$BASE" --file - --tag "$PROMETHEUS" docker >/dev/null <<'DOCKERFILE'
ARG BASE
FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends prometheus wget \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner nobody --group nogroup /prometheus
USER 65534:65534
ENTRYPOINT ["/usr/bin/prometheus"]
DOCKERFILE
}

run_image() {
  has_image "$IMAGE" || make_image
  local folder code=0
  folder="$(mktemp -d /var/tmp/petals-eval-run.XXXXXX)"
  note "the image alone, then the compose file; logs in $folder"
  "$PYTHON" scripts/compose_with_runc.py alone "$folder/version" "$IMAGE" --version >&2
  "$PYTHON" scripts/compose_with_runc.py alone "$folder/demo" "$IMAGE" demo >&2
  "$PYTHON" scripts/compose_with_runc.py compose "$folder/compose" "$IMAGE" "prometheus=$PROMETHEUS" || code=$?
  [ "$code" != 0 ] || rm -rf "$folder"
  return "$code"
}

clean() {
  local image
  for image in "$IMAGE" "$PROMETHEUS" "$BASE"; do
    ! has_image "$image" || buildah rmi --force "$image" >/dev/null
  done
}

check_machine
[ $# -gt 0 ] || set -- base image run
for step in "$@"; do
  case "$step" in
    base) make_base ;;
    image) make_image ;;
    run) run_image ;;
    clean) clean ;;
    *) fail "expected base, image, run or clean, found $step" ;;
  esac
done
