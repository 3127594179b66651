# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# Functions that the scripts share; to be sourced, not run.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"

# die MESSAGE: says what is wrong and what to do about it, and ends the script.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# print_help: the comment that opens the calling script.
print_help() {
    awk 'NR == 1 || /SPDX-License-Identifier/ {next} !/^#/ {exit} {sub(/^# ?/, ""); if ($0 != "" || seen) print; seen = 1}' "$0"
}

# find_python: prints the path of a Python 3.11 that can make virtual environments.
find_python() {
    local candidate path tried=''
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
        path="$("$candidate" -c 'import sys; print(sys.executable)' 2>/dev/null)" || continue
        if ! "$path" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
            tried+=" $path is $("$path" -V);"
            continue
        fi
        "$path" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$path cannot make virtual environments: its venv module is missing." \
                "On Debian and Ubuntu: apt-get install python3.11-venv"
        echo "$path"
        return
    done
    die "Python 3.11 was not found (the locked versions are made for it).${tried:+ Found only:$tried}" \
        "Install Python 3.11, or name one: PYTHON=/path/to/python3.11 $0"
}

# use_test_environment: VENV becomes one that may hold PyTorch, which must not meet the GPU lock (see
# requirements-torch.txt): where .venv holds that lock, the tests have an environment of their own.
use_test_environment() {
    if has_gpu; then export VENV="$VENV-cpu"; fi
}

# dataset_arguments NAME [DIR] [OPTION...]: sets name (that of the dataset's folder), data_dir and options;
# without a NAME it prints the help.
# shellcheck disable=SC2034 # The caller uses what it sets.
dataset_arguments() {
    case "${1:-}" in
        -h | --help | '') print_help; exit ;;
        digits | cifar10) name="$1" ;;
        imagenet | imagenet2012) name=imagenet2012 ;;
        *) die "unknown dataset $1; known are digits, cifar10 and imagenet" ;;
    esac
    shift
    data_dir="$ROOT/data"
    if [[ $# -gt 0 && "$1" != -* ]]; then
        data_dir="$1"
        [[ "$data_dir" == /* ]] || data_dir="$PWD/$data_dir"
        shift
    fi
    options=("$@")
}

# data_preparation ARGUMENT...: becomes `python -m data_preparation ARGUMENT...`. Wrong arguments are rejected
# before the environment is set up.
data_preparation() {
    local python="$VENV/bin/python"
    case " $* " in *' -h '* | *' --help '*) print_help; exit ;; esac
    [[ -x "$python" ]] || python="$(find_python)"
    export PYTHONPATH="$ROOT"
    "$python" -c 'from data_preparation.__main__ import parse_arguments; parse_arguments()' "$@"
    "$ROOT/scripts/setup_env.sh"
    exec "$VENV/bin/python" -m data_preparation "$@"
}

# has_gpu: true where an NVIDIA driver answers and sees a GPU.
has_gpu() {
    [[ "$(nvidia-smi -L 2>/dev/null)" == GPU* ]]
}
