#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Sets up the environment, checks the code's format, style, types and spelling, and runs the tests, all on the CPU.
#
# Usage: scripts/run_tests.sh [--all] [ARGUMENT...]
#   --all        the slow tests too, some 20 minutes on 2 cores; without them 6 to 9 minutes the first time, then 4 to 5
#   ARGUMENT...  for pytest, such as tests/workloads/resnet/test_optimizers.py or -k lars
#
# Without ARGUMENT tests run two files at a time. Those marked `alone` run only with --all, one at a time.
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
check codespell
[[ ${#failed[@]} == 0 ]] || die "rejected by ${failed[*]}, see above; ruff check --fix and ruff format fix what they can"

selection='not slow'
if "$all"; then selection='slow or not slow'; fi
if [[ $# -gt 0 ]]; then
    exec python -m pytest -m "$selection" "$@"
fi
status=0
# In the order of files, for the longest are among the first.
python -m pytest -m "($selection) and not alone" \
    --numprocesses=2 --dist=loadfile --no-loadscope-reorder || status=$?
if "$all"; then python -m pytest -m alone || status=$?; fi
exit "$status"
