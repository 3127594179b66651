#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the container image and runs the embedded benchmark in it, as the image's own user.
#
# Usage: scripts/dev/test_container.sh [--gpu]
#   --gpu   the image with the CUDA wheels (default: the CPU image); it is built, and run on the CPU
#
# Builds with docker or podman where one answers. Else, as root on Debian, with buildah, which needs no
# daemon, on a stand-in for the base image made of Debian's own Python 3.11 packages by mmdebstrap, so that
# no image registry is needed: apt-get install --no-install-recommends buildah mmdebstrap
#
# Environment: BUILD_OPTIONS   more options for the builder, such as --volume=/etc/pip.conf:/etc/pip.conf:ro
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

lock=cpu
case "${1:-}" in
    '') ;;
    --gpu) lock=gpu ;;
    -h | --help) print_help; exit ;;
    *) die "unknown argument $1; $0 --help lists the known ones" ;;
esac
read -r -a build_options <<< "${BUILD_OPTIONS:-}"
image=localhost/training-jax-test
cd "$ROOT"

# Each builder has build (of the image) and in_image COMMAND... (in a container, as the image's user).
if builder="$(for b in docker podman; do "$b" info &> /dev/null && echo "$b" && break; done)"; then
    build() { "$builder" build --build-arg "LOCK=$lock" --tag "$image" "${build_options[@]}" .; }
    in_image() { "$builder" run --rm "$image" "$@"; }
    trap '"$builder" rmi --force "$image" > /dev/null' EXIT
elif command -v buildah > /dev/null && command -v mmdebstrap > /dev/null && [[ "$(id -u)" == 0 ]]; then
    builder='buildah, on a stand-in for the base image'
    storage="$(mktemp -d)"
    trap 'rm -rf "$storage"' EXIT
    bud() { buildah --root "$storage/root" --runroot "$storage/run" --storage-driver vfs "$@"; }
    build() {
        local base container
        base="$(sed -n 's/^ARG BASE=\([^@]*\)@.*/\1/p' Dockerfile)"
        sed 's/^\(ARG BASE=[^@]*\)@.*/\1/' Dockerfile > "$storage/Dockerfile" # The stand-in has another digest.
        mmdebstrap --quiet --variant=minbase --include=python3.11,python3.11-venv,ca-certificates \
            bookworm "$storage/base.tar"
        container="$(bud from scratch)"
        bud add --quiet "$container" "$storage/base.tar" / > /dev/null
        bud commit --quiet --rm "$container" "docker.io/library/$base" > /dev/null
        bud build --isolation chroot --pull-never --file "$storage/Dockerfile" --build-arg "LOCK=$lock" \
            --tag "$image" "${build_options[@]}" .
        bud from --quiet --pull-never --name image "$image" > /dev/null
    }
    in_image() { bud run --isolation chroot image -- "$@"; }
else
    die 'no builder: docker and podman do not answer, and buildah and mmdebstrap are not there or this is not root;' \
        "see $0 --help"
fi

SECONDS=0
build
echo "built with $builder, lock $lock: $SECONDS s"

[[ "$(in_image id -u)" == 1000 ]] || die 'the image does not run as user 1000'
[[ -z "$(in_image scripts/setup_env.sh)" ]] || die 'set-up found something to do in the image'
left="$(in_image find /benchmark /root /home /tmp \( -path '*/pip/http*' -o -name '*.whl' -o -name '.venv.*' \) -not -path '*/ensurepip/*' 2> /dev/null)" || true
[[ -z "$left" ]] || die "the build left this behind: $left"
SECONDS=0
in_image scripts/run_and_time.sh
echo "ran as user 1000: $SECONDS s"
