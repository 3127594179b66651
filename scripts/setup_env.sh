#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes the virtual environment that the other scripts run in; does nothing when it is up to date.
#
# Usage: scripts/setup_env.sh [--cpu | --gpu | --cuda13] [--test]
#   --cpu    the versions of requirements-cpu.txt and requirements-tools.txt
#   --gpu    those of requirements.txt, the same and the CUDA 12 wheels (driver 525 or newer), and
#            requirements-tools.txt
#   --cuda13 those of requirements-cuda13.txt: a newer JAX and CUDA 13, for GPUs from Ampere on (driver 580
#            or newer), and requirements-tools.txt; needs Python 3.12
#            default: --gpu where nvidia-smi sees a GPU, else --cpu
#   --test   the tools of requirements-test.txt as well and, with --cpu, PyTorch (requirements-torch.txt)
#
# Environment: VENV    where to make it (default: .venv in the repository)
#              PYTHON  a Python to make it from (default: python3.11, or python3.12 with --cuda13, or python3)
#              LOCK    cpu, gpu or cuda13, as the flags
#
# Needs Python 3.11 (or 3.12, see above) and a package index. Every package except those of requirements-torch.txt
# is checked against its hash. Concurrent calls wait for each other; an interrupted set-up is started again.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

lock="${LOCK:-}"
with_tests=false
for argument in "$@"; do
    case "$argument" in
        --cpu) lock=cpu ;;
        --gpu) lock=gpu ;;
        --cuda13) lock=cuda13 ;;
        --test) with_tests=true ;;
        -h | --help) print_help; exit ;;
        *) die "unknown argument $argument; $0 --help lists the known ones" ;;
    esac
done
[[ -n "$lock" ]] || { if has_gpu; then lock=gpu; else lock=cpu; fi; }

cd "$ROOT"
main_locks=(requirements-cpu.txt requirements-tools.txt)
test_locks=(requirements-test.txt requirements-torch.txt)
wanted=3.11
case "$lock" in
    cpu) ;;
    gpu) main_locks=(requirements.txt requirements-tools.txt) test_locks=(requirements-test.txt) ;;
    cuda13)
        main_locks=(requirements-cuda13.txt requirements-tools.txt) test_locks=(requirements-test.txt)
        wanted=3.12
        ;;
    *) die "LOCK is '$lock'; it can be cpu, gpu or cuda13" ;;
esac

# A stamp tells what an environment was made from and where; without its stamp it counts as broken.
stamp() {
    cat requirements-build.txt "${main_locks[@]}" "$@" | sha256sum | cut -d' ' -f1
    echo "$VENV" "$ROOT"
}
holds() { # holds NAME LOCK...: is the stamp NAME there, and right?
    [[ -f "$VENV/$1.stamp" && "$(stamp "${@:2}")" == "$(< "$VENV/$1.stamp")" ]] &&
        [[ "$("$VENV/bin/python" -c "$python_version" 2>/dev/null)" == "$wanted" ]]
}
up_to_date() {
    holds main && { ! "$with_tests" || holds test "${test_locks[@]}"; }
}
pip_install() {
    "$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-input "$@" ||
        die "pip could not install this: $*. Its message above says why (a package index must be within reach);" \
            "then run $0 again"
}

! up_to_date || exit 0
if command -v flock > /dev/null; then
    { exec 9> "$VENV.lock"; } 2> /dev/null ||
        die "cannot write to $(dirname "$VENV"); name another place: VENV=DIRECTORY $0"
    flock --nonblock 9 || { echo 'waiting for another set-up of the same environment'; flock 9; }
    ! up_to_date || exit 0
fi

SECONDS=0
if ! holds main; then
    python="$(find_python "$wanted")"
    [[ ! -e "$VENV" || -f "$VENV/pyvenv.cfg" || -f "$VENV/unfinished" || -z "$(ls -A "$VENV")" ]] ||
        die "$VENV is there and is no virtual environment; move it away, or name another place: VENV=DIRECTORY $0"
    echo "making $VENV from $("$python" -V) and ${main_locks[*]}; this takes a minute or so"
    rm -rf "$VENV.removing"
    [[ ! -e "$VENV" ]] || mv "$VENV" "$VENV.removing" # at once, so that no half of it is ever met
    mkdir "$VENV"
    touch "$VENV/unfinished"
    rm -rf "$VENV.removing"
    "$python" -m venv "$VENV" || die "cannot make $VENV; name another place: VENV=DIRECTORY $0"
    pip_install --require-hashes -r requirements-build.txt
    for main_lock in "${main_locks[@]}"; do
        # Locks are complete, but for what is left out on purpose.
        pip_install --require-hashes --no-deps --no-build-isolation -r "$main_lock"
    done
    # Programs of every folder import modules from the root.
    echo "$ROOT" > "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/repository.pth"
    stamp > "$VENV/main.stamp"
    rm "$VENV/unfinished"
fi
if "$with_tests" && ! holds test "${test_locks[@]}"; then
    echo "adding ${test_locks[*]} to $VENV"
    rm -f "$VENV"/*.stamp
    pip_install --require-hashes -r requirements-test.txt
    [[ "$lock" != cpu ]] || pip_install -r requirements-torch.txt
    stamp > "$VENV/main.stamp"
    stamp "${test_locks[@]}" > "$VENV/test.stamp"
fi
echo "environment ready after $SECONDS s"
