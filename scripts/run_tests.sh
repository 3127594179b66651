#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Sets up the environment, checks the code's form and types, and runs the tests, all on the CPU.
#
# Usage: scripts/run_tests.sh [--all] [ARGUMENT...]
#   --all        the slow tests too: some 35 minutes on 2 cores
#   ARGUMENT...  for pytest, such as tests/test_optimizers.py or -k lars
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

selection=(-m 'not slow')
case "${1:-}" in
    --all) selection=(); shift ;;
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
check shellcheck -x scripts/*.sh benchmarks/*.sh .ci/run
check hadolint Dockerfile
[[ ${#failed[@]} == 0 ]] || die "refused by ${failed[*]}, see above; ruff check --fix and ruff format mend what they can"

exec python -m pytest ${selection[@]+"${selection[@]}"} "$@"
