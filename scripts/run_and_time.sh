#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Trains a configuration to its target, has the log judged by the official checker, prints the result.
#
# Usage: scripts/run_and_time.sh [CONFIG] [--workdir=DIR] [--gpus=N | --cpus=N] [--config.NAME=VALUE...]
#   CONFIG        configs/digits.py (default), configs/speeches.py, configs/imagenet.py, configs/llama31_8b.py, …,
#                 or a file of yours
#   --workdir     where everything is written (default: runs/NAME-1, or the next number that is not
#                 finished); the same command resumes a run that was interrupted
#   --gpus=N      N processes with one GPU each (default: all GPUs that CUDA_VISIBLE_DEVICES or the driver names)
#   --cpus=N      N processes on the CPU
#   --version     prints the version, and does nothing else
#   --config.NAME=VALUE  overrides a field; python main.py --config=CONFIG --help lists them
#
# Sets up the environment first, and prepares the digits and the speeches; other data sets are prepared by
# scripts/download_dataset.sh. The last line is RESULT,DATASET,SEED,SECONDS,USER,START. Exit status:
# 0 target reached and log accepted, 1 not, 2 rejected before the start, 3 failed, 75 interrupted: the same
# command resumes.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

config=''
workdir='' data_dir='' processes=() fields=()
choose() {
    [[ -z "$config" ]] || die "two configurations, $config and $1: give one"
    config="$1"
}
for argument in "$@"; do
    case "$argument" in
        -h | --help) print_help; exit ;;
        --version) sed -n 's/^version: //p' "$ROOT/CITATION.cff"; exit ;;
        --workdir=*) workdir="${argument#*=}" ;;
        --gpus=* | --cpus=*)
            [[ "${argument#*=}" =~ ^[1-9][0-9]{0,3}$ ]] || die "$argument: give the number of processes, from 1"
            [[ ${#processes[@]} -eq 0 ]] || die "give one of --gpus and --cpus, once"
            processes=("$argument")
            ;;
        --workdir | --gpus | --cpus | --config) die "$argument needs its value after a =: $argument=VALUE" ;;
        --mode=*) die "$argument is for main.py; this script trains and judges" ;;
        --config.data_dir=*) data_dir="${argument#*=}" ;;
        --config=*) choose "${argument#*=}" ;;
        -*) fields+=("$argument") ;; # main.py judges them.
        *) choose "$argument" ;;
    esac
done
config="${config:-configs/digits.py}"
if [[ ${#processes[@]} -eq 0 ]]; then
    gpus="${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2> /dev/null | grep '^GPU' | cut -d: -f1 | paste -sd, || true)}"
    IFS=, read -ra gpus <<< "$gpus"
    [[ ${#gpus[@]} -le 1 ]] || processes=("--gpus=${#gpus[@]}")
fi
name="$(basename -- "${config%%:*}")"
name="${name%.*}"
if [[ "$config" == *.json ]]; then
    # Of a work directory: its data, unless others are named, and beside its runs a name of their own.
    name="$(basename -- "$(dirname -- "$(realpath -m -- "$config")")")-again"
else
    data_dir="${data_dir:-$ROOT/data}"
fi

"$ROOT/scripts/setup_env.sh"
python="$VENV/bin/python"
arguments=("--config=$config" ${fields[@]+"${fields[@]}"})
if [[ -n "$data_dir" ]]; then
    data_dir="$(realpath -m -- "$data_dir")"
    arguments+=("--config.data_dir=$data_dir")
fi
# Before anything is prepared or written.
"$python" "$ROOT/main.py" "${arguments[@]}" --mode=check
case "$name" in
    digits | speeches) (cd "$ROOT" && "$python" -m data_preparation prepare "$name" "$data_dir") | tail -n 1 ;;
esac
if [[ -z "$workdir" ]]; then
    number=1
    while grep -qs '"run_stop"' "$ROOT/runs/$name-$number/mlperf.log"; do number=$((number + 1)); done
    workdir="$ROOT/runs/$name-$number"
fi
mkdir -p "$(dirname "$workdir")" 2> /dev/null || die "cannot make $workdir; choose another: --workdir=DIR"

command=("$ROOT/main.py" "--workdir=$workdir" "${arguments[@]}")
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
status="$(exit_status "$status")"
[[ $status -le 1 ]] || exit "$status"
exec "$python" "$ROOT/scripts/judge_run.py" "$workdir"
