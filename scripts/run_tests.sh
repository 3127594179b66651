#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Sets up the environment, checks the code's format and types, and runs the tests, all on the CPU.
#
# Usage: scripts/run_tests.sh [--all] [ARGUMENT...]
#   --all        the slow tests too: some 30 minutes on 2 cores
#   ARGUMENT...  for pytest, such as tests/workloads/resnet/test_optimizers.py or -k lars
#
# Without ARGUMENT the fast tests run two files at a time; the slow ones use the machine alone.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

all=false
case "${1:-}" in
    --all) all=true; shift ;;
    -h | --help) print_help; exit ;;
esac

use_test_environment
"$ROOT/scripts/setup_env.sh" --cpu --test
cd "$ROOT"
export PATH="$VENV/bin:$PATH"
export JAX_PLATFORMS=cpu
# Programs that several tests and several processes compile are compiled once.
export JAX_COMPILATION_CACHE_DIR="$ROOT/.cache/jax"

failed=()
check() {
    printf '%s\n' "checking: $*"
    "$@" || failed+=("$1")
}
check ruff check --quiet .
check ruff format --check --quiet .
check mypy --no-error-summary
check shellcheck -x scripts/*.sh scripts/dev/*.sh experiments/*.sh speed/*.sh .ci/run
check hadolint Dockerfile
[[ ${#failed[@]} == 0 ]] || die "rejected by ${failed[*]}, see above; ruff check --fix and ruff format fix what they can"

if [[ $# -gt 0 ]]; then
    selection=(-m 'not slow')
    if "$all"; then selection=(); fi
    exec python -m pytest ${selection[@]+"${selection[@]}"} "$@"
fi
status=0
python -m pytest -m 'not slow' --numprocesses=2 --dist=loadfile || status=$?
if "$all"; then python -m pytest -m slow || status=$?; fi
exit "$status"
