#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Checks a prepared dataset against its metadata and its manifest, and names every fault.
#
# Usage: scripts/verify_dataset.sh {digits | cifar10 | imagenet} [DIR] [OPTION...]
#   DIR              the root of all data (default: data in the repository)
#   --full           decode every image, not only its header
#   --manifest FILE  compare with this manifest instead of the published one
#   --workers N      threads (default: one per core)
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dataset_arguments "$@"
"$ROOT/scripts/setup_env.sh"
export PYTHONPATH="$ROOT"
exec "$VENV/bin/python" -m data_preparation verify "$name" --data_dir="$data_dir" "${options[@]}"
