#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Trains a configuration to its target, has the log judged by the official checker, prints the result.
#
# Usage: scripts/run_and_time.sh [CONFIG] [--workdir=DIR] [--gpus=N | --cpus=N] [--config.NAME=VALUE...]
#   CONFIG        configs/digits.py (default), configs/cifar10.py, configs/imagenet.py, or a file of yours
#   --workdir     where everything is written (default: runs/NAME-1, or the next number that is not
#                 finished); the same command goes on with a run that was interrupted
#   --gpus=N      N processes with one GPU each (default: one process with all GPUs that it sees)
#   --cpus=N      N processes on the CPU
#   --config.NAME=VALUE  overrides a field of the configuration; python main.py --help lists them
#
# Sets up the environment first, and prepares the digits; other data sets are prepared by
# scripts/download_dataset.sh. The last line is RESULT,NAME,SEED,SECONDS,USER,START. Exit status:
# 0 target reached and log accepted, 1 not, 2 refused before the start, 3 failed, 75 interrupted and saved.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

config=configs/digits.py
workdir='' processes=() fields=()
data_dir="$ROOT/data"
for argument in "$@"; do
    case "$argument" in
        -h | --help) print_help; exit ;;
        --workdir=*) workdir="${argument#*=}" ;;
        --gpus=* | --cpus=*) processes=("$argument") ;;
        --config=*) config="${argument#*=}" ;;
        --config.data_dir=*) data_dir="${argument#*=}" ;;
        --*) fields+=("$argument") ;;
        *) config="$argument" ;;
    esac
done
name="$(basename "${config%%:*}" .py)"

"$ROOT/scripts/setup_env.sh"
python="$VENV/bin/python"
if [[ "$name" == digits ]]; then
    (cd "$ROOT" && "$python" -m data_preparation digits --data_dir="$(realpath -m "$data_dir")") |
        tail -n 1
fi
if [[ -z "$workdir" ]]; then
    number=1
    while grep -qs '"run_stop"' "$ROOT/runs/$name-$number/mlperf.log"; do number=$((number + 1)); done
    workdir="$ROOT/runs/$name-$number"
fi
mkdir -p "$(dirname "$workdir")" 2> /dev/null || die "cannot make $workdir; choose another: --workdir=DIR"

command=("$ROOT/main.py" "--config=$config" "--workdir=$workdir" "--config.data_dir=$data_dir")
command+=(${fields[@]+"${fields[@]}"})
if [[ ${#processes[@]} -gt 0 ]]; then
    command=("$ROOT/scripts/launch.py" "${processes[@]}" -- "${command[@]}")
fi
# The program, not this shell, answers Ctrl-C and SIGTERM; it saves and leaves.
trap 'kill -TERM "$child" 2> /dev/null || true' TERM
trap ':' INT
"$python" "${command[@]}" &
child=$!
status=0
wait "$child" || status=$?
while kill -0 "$child" 2> /dev/null; do status=0; wait "$child" || status=$?; done
trap - TERM INT
[[ $status -le 1 ]] || exit "$status"
exec "$python" "$ROOT/scripts/judge_run.py" "$workdir" --name="$name"
