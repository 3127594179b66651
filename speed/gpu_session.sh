#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything about speed that needs a GPU, in one command: is fp32 fp32, the table of the training step
# beside PyTorch, the loop against the bare step, the time to the first step, a profile.
#
# Usage: speed/gpu_session.sh [PART...]
#   PART  fp32, digits, same, main, grid, llama, first, profile (default: all, in this order; same trains the digits
#         twice and once interrupted, and on several GPUs if there are, and compares the fingerprints; main is
#         the comparison at batch 256, with and without exact sums, grid the other batches, float16 and
#         accumulation)
#
# Environment: OUT             where the results go (default: runs/gpu_session)
#              PYTHON          a Python with JAX for the GPU and what main.py imports (default: .venv's,
#                              made by scripts/setup_env.sh --gpu)
#              PEER_PYTHON     a Python with PyTorch and torchvision, see speed/requirements-train-step.txt
#                              (default: PYTHON, if it has them; without them there is no comparison)
#              LIMIT_SECONDS   for one part (default: 600)
#              REHEARSAL       not empty: also without a GPU, and with steps so small that a CPU takes minutes:
#                              REHEARSAL=yes PYTHON=.venv/bin/python speed/gpu_session.sh
#
# Results: $OUT/table.md, $OUT/results.jsonl, $OUT/log.txt, $OUT/trace.json.gz (for Perfetto). A part that
# fails, or is cut short, is said at the end; the others still run.
set -uo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"
case "${1:-}" in -h | --help) print_help; exit ;; esac

cd "$ROOT" || die "cannot enter $ROOT"
OUT="${OUT:-runs/gpu_session}"
mkdir -p "$OUT" || die "cannot write to OUT=$OUT"
if [[ -z "${PYTHON:-}" ]]; then
    scripts/setup_env.sh --gpu || die 'the environment could not be made; see above, or name a Python: PYTHON=...'
    PYTHON="$VENV/bin/python"
fi
"$PYTHON" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' ||
    [[ -n "${REHEARSAL:-}" ]] || die "JAX of $PYTHON sees no GPU"
PEER_PYTHON="${PEER_PYTHON:-$PYTHON}"
peer=()
if "$PEER_PYTHON" -c 'import tests.torchvision_models' 2> /dev/null; then
    peer=(--peer_python="$PEER_PYTHON")
else
    echo "no comparison: $PEER_PYTHON lacks pytest, torch or torchvision"
fi
cache="$OUT/cache"
trap 'rm -rf "$cache" "$OUT/scratch"' EXIT # Neither belongs to the results.

"$PYTHON" -m data_preparation prepare digits data || die 'the digits could not be prepared; see above'

failed=()
part() { # part NAME COMMAND...: runs it within the limit, into the log
    echo "== $1: $(date -u +%H:%M:%S)" | tee -a "$OUT/log.txt"
    PYTHONUNBUFFERED=1 timeout "${LIMIT_SECONDS:-600}" "${@:2}" 2>> "$OUT/log.txt" | tee -a "$OUT/table.md" ||
        failed+=("$1")
}

# Trains the digits in several ways; prints the fingerprint and the accuracy that each ended with.
same() {
    local run="$OUT/scratch/same" count gpus way="--gpus"
    gpus="$(nvidia-smi --list-gpus 2> /dev/null | wc -l)"
    ((gpus > 0)) || { way="--cpus"; gpus=2; }
    # Each compiles for itself, and so tunes its kernels: compiled programs are kept beside a work directory.
    digits() { # digits NAME COMMAND...
        "${@:2}" main.py --config=configs/digits.py --workdir="$run/$1/run" --config.seed=20261123 >&2
    }
    digits first "$PYTHON"
    digits again "$PYTHON"
    # Interrupted in its second epoch, so that it resumes.
    digits resumed "$PYTHON" > /dev/null &
    until [[ -s "$run/resumed/run/metrics.jsonl" ]] || ! kill -0 $! 2> /dev/null; do sleep 0.02; done
    pkill -TERM -P $!
    wait $!
    digits resumed "$PYTHON"
    for count in 2 4 8; do
        ((count > gpus)) || digits "processes-$count" "$PYTHON" scripts/launch.py "$way=$count" --
    done
    "$PYTHON" scripts/fingerprint.py "$run"/*/run
}
export -f same
export OUT PYTHON

step=("$PYTHON" speed/train_step.py --cache="$cache" --json="$OUT/results.jsonl")
declare -A layouts=([bfloat16]=channels_last [float32]=contiguous_format) # PyTorch's faster ones on an H100.
small=()
if [[ -n "${REHEARSAL:-}" ]]; then
    small=(--config=configs/digits.py --model=resnet_digits --image_size=8 --classes=10 --span=4 --batches=8
        --rounds=1 --steps=2 --loop_steps=4 --ceiling_size=64 --peer_compile=none)
fi
for name in "${@:-all}"; do
    known=no
    wants() { [[ "$name" == all || "$name" == "$1" ]] && known=yes; }
    if wants fp32; then part fp32 "$PYTHON" speed/fp32_check.py; fi
    if wants digits; then
        for dtype in float32 bfloat16 float16; do
            part "digits-$dtype" "$PYTHON" main.py --config=configs/digits.py --workdir="$OUT/scratch/$dtype" \
                --config.dtype=$dtype --config.log_every_steps=200
        done
    fi
    if wants same; then part same bash -c same; fi
    if wants main; then
        for dtype in bfloat16 float32; do
            part "main-$dtype" "${step[@]}" "${peer[@]}" --dtypes=$dtype --batches=256 --rounds=3 --loop_steps=400 --plain \
                --peer_layout="${layouts[$dtype]}" "${small[@]}"
        done
    fi
    if wants grid; then
        part grid-bfloat16 "${step[@]}" "${peer[@]}" --dtypes=bfloat16 --batches=64,128,512 --rounds=3 "${small[@]}"
        part grid-float16 "${step[@]}" "${peer[@]}" --dtypes=float16 --batches=256 --rounds=3 "${small[@]}"
        part grid-float32 "${step[@]}" "${peer[@]}" --dtypes=float32 --batches=64,128,512 --rounds=3 --steps=10 \
            --peer_layout="${layouts[float32]}" "${small[@]}"
        part grid-accumulation "${step[@]}" "${peer[@]}" --dtypes=bfloat16,float32 --batches=256 --accumulation=4 \
            --rounds=3 --steps=5 "${small[@]}"
        part grid-any-order "${step[@]}" --dtypes=float32,bfloat16 --batches=256 --rounds=3 --any_order "${small[@]}"
    fi
    if wants llama; then
        llama=("$PYTHON" speed/llama_step.py --rounds=3)
        [[ ${#peer[@]} == 0 ]] || llama+=("${peer[@]}" --peer_compile=default)
        if [[ -n "${REHEARSAL:-}" ]]; then
            part llama "${llama[@]}" --steps=2 --rounds=1 --peer_compile=none
        else
            part llama "${llama[@]}" --model=llama_1b --length=2048 --batch=2 --accumulation=4 --dtype=bfloat16
            part llama-bytes "${llama[@]}" --batch=16 --accumulation=1
        fi
    fi
    if wants first; then part first "$PYTHON" speed/first_step.py configs/digits.py; fi
    if wants profile; then
        part profile "${step[@]}" --dtypes=bfloat16 --batches=256 --rounds=1 --trace="$OUT/scratch/profile" "${small[@]}"
        find "$OUT/scratch/profile" -name '*.trace.json.gz' -exec cp {} "$OUT/trace.json.gz" \;
        [[ -s "$OUT/trace.json.gz" ]] || failed+=(trace)
    fi
    [[ "$known" == yes ]] || die "unknown part $name; $0 --help lists the known ones"
done
echo "results: $OUT/table.md, $OUT/results.jsonl"
[[ ${#failed[@]} == 0 ]] || die "failed or cut short: ${failed[*]}; see $OUT/log.txt"
