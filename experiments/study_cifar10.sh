#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The convergence study on CIFAR-10: many seeds, two precisions, accumulation; reference points, reports.
#
# Usage: experiments/study_cifar10.sh [--small] [--out=DIR] [--data_dir=DIR] [--dtype=float32|bfloat16] [--jobs=J]
#   --small      the reduced network (configs/cifar10_small.py), 20 seeds: about an hour on two CPU cores
#   --out        everything is written here (default: runs/cifar10-study or runs/cifar10-study-small)
#   --data_dir   root of all data (default: data); scripts/download_dataset.sh cifar10 prepares it
#   --dtype      of the 20 runs (default: float32); 5 runs have the other one
#   --jobs       runs at a time (default: what fits); for times that count, 1
#
# The same command resumes; finished runs are kept. Without --small:
#   DIR/lars-DTYPE   20 seeds, the reference points (rcps.json) are made from them
#   DIR/lars-OTHER   5 seeds in the other precision
#   DIR/sgd-DTYPE    5 seeds with SGD
#   DIR/accumulation-K  the same 3 seeds, each batch in K = 1, 4, 16 micro-steps on one device
# and in each a report.html. Exit status: 0 all runs met the target, 1 some did not, else see main.py.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

small='' out='' data_dir="$ROOT/data" dtype=float32 jobs=()
for argument in "$@"; do
    case "$argument" in
        -h | --help) print_help; exit ;;
        --small) small=yes ;;
        --out=*) out="${argument#*=}" ;;
        --data_dir=*) data_dir="${argument#*=}" ;;
        --dtype=float32 | --dtype=bfloat16) dtype="${argument#*=}" ;;
        --jobs=*) jobs=("$argument") ;;
        *) die "unknown argument $argument; see $0 --help" ;;
    esac
done
out="${out:-$ROOT/runs/cifar10-study${small:+-small}}"
"$ROOT/scripts/setup_env.sh"
python="$VENV/bin/python"
missed=0

# attempt COMMAND…: notes a missed target (status 1) and continues; any other failure ends the study.
attempt() {
    local status=0
    "$@" || status=$?
    [[ $status -le 1 ]] || exit "$status"
    [[ $status -eq 0 ]] || missed=1
}

# seeds NAME RUNS CONFIG [FIELD…]: RUNS runs with seeds of their own in DIR/NAME, and their report.
seeds() {
    local folder="$out/$1" runs="$2" config="$3"
    shift 3
    echo "== $folder: $runs seeds"
    attempt "$python" "$ROOT/scripts/run_seeds.py" "--config=$config" "--runs=$runs" "--out=$folder" \
        ${jobs[@]+"${jobs[@]}"} "--config.data_dir=$data_dir" "$@"
    "$python" "$ROOT/scripts/report.py" "$folder"
}

# accumulated K: the batch of 512 in K micro-steps, three given seeds, the same for every K.
accumulated() {
    local folder="$out/accumulation-$1" gpu="${CUDA_VISIBLE_DEVICES:-0}" seed
    gpu="${gpu%%,*}"
    for seed in 1 2 3; do
        echo "== $folder/$seed"
        attempt env CUDA_VISIBLE_DEVICES="$gpu" "$python" "$ROOT/main.py" \
            --config=configs/cifar10.py "--workdir=$folder/$seed" \
            "--config.data_dir=$data_dir" "--config.dtype=$dtype" "--config.seed=$seed" \
            "--config.micro_batch_size=$((512 / $1))"
    done
    "$python" "$ROOT/scripts/report.py" "$folder"
}

if [[ -n "$small" ]]; then
    seeds small 20 configs/cifar10_small.py "--config.dtype=$dtype"
    "$python" "$ROOT/scripts/make_rcps.py" "$out/small" || missed=1
    exit "$missed"
fi
other=bfloat16
[[ $dtype == float32 ]] || other=float32
seeds "lars-$dtype" 20 configs/cifar10.py "--config.dtype=$dtype"
"$python" "$ROOT/scripts/make_rcps.py" "$out/lars-$dtype" || missed=1
seeds "lars-$other" 5 configs/cifar10.py "--config.dtype=$other"
seeds "sgd-$dtype" 5 configs/cifar10.py:sgd "--config.dtype=$dtype"
for k in 1 4 16; do
    accumulated "$k"
done
exit "$missed"
