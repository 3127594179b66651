#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Checks a prepared dataset against its metadata and its manifest, and names every error.
#
# Usage: scripts/verify_dataset.sh NAME [DIR] [OPTION...]      (--help lists the names and options)
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

data_preparation verify "${@:---help}"
