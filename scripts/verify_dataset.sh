#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Checks a prepared dataset against its metadata and its manifest, and names every error.
#
# Usage: scripts/verify_dataset.sh {digits | cifar10 | imagenet} [DIR] [OPTION...]
#   DIR              the root of all data (default: data in the repository)
#   --full           decode every image, not only its header
#   --manifest FILE  compare with this manifest instead of the published one
#   --workers N      threads (default: one per core)
#
# Exit status: 0 no errors, 2 errors, 130 stopped by Ctrl-C.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dataset_arguments "$@"
data_preparation verify "$name" --data_dir="$data_dir" "${options[@]}"
