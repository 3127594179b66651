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

# A program that prints the minor version of the Python that runs it.
python_version='import sys; print("%d.%d" % sys.version_info[:2])'

# find_python [VERSION]: prints the path of a Python VERSION (3.11) that can make virtual environments.
find_python() {
    local wanted="${1:-3.11}" candidate path tried=''
    for candidate in ${PYTHON:+"$PYTHON"} "python$wanted" python3 python; do
        path="$("$candidate" -c 'import sys; print(sys.executable)' 2>/dev/null)" || continue
        if [[ "$("$path" -c "$python_version")" != "$wanted" ]]; then
            tried+=" $path is $("$path" -V);"
            continue
        fi
        "$path" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$path cannot make virtual environments: its venv module is missing." \
                "On Debian and Ubuntu: apt-get install python$wanted-venv"
        echo "$path"
        return
    done
    die "Python $wanted was not found (the locked versions are made for it).${tried:+ Found only:$tried}" \
        "Install Python $wanted, or name one: PYTHON=/path/to/python$wanted $0"
}

# use_test_environment: VENV becomes one that may hold PyTorch, which must not meet the GPU lock (see
# requirements-torch.txt): where .venv holds that lock, the tests have an environment of their own.
use_test_environment() {
    if has_gpu; then export VENV="$VENV-cpu"; fi
}

# data_preparation ARGUMENT...: becomes `python -m data_preparation ARGUMENT...`. It prints its help, and rejects
# wrong arguments, before the environment is set up; any Python can do that.
data_preparation() {
    local python="$VENV/bin/python" help
    [[ -x "$python" ]] || python="$(find_python)"
    export PYTHONPATH="$ROOT"
    help="$("$python" -c 'from data_preparation.__main__ import parse_arguments; parse_arguments()' "$@")"
    if [[ -n "$help" ]]; then echo "$help"; exit; fi
    "$ROOT/scripts/setup_env.sh"
    exec "$VENV/bin/python" -m data_preparation "$@"
}

# exit_status STATUS: prints what main.py says with it: 75, interrupted, where a process hung and ended itself by
# SIGALRM; 3, failed, where one did not get the others to end with it, and ended itself by SIGUSR1.
exit_status() {
    case "$1" in
        $((128 + 14))) echo 75 ;;
        $((128 + 10))) echo 3 ;;
        *) echo "$1" ;;
    esac
}

# has_gpu: true where an NVIDIA driver answers and sees a GPU.
has_gpu() {
    [[ "$(nvidia-smi -L 2>/dev/null)" == GPU* ]]
}
