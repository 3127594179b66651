#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Downloads and prepares a dataset; does nothing if it is there, and resumes what was interrupted.
#
# Usage: scripts/download_dataset.sh NAME [DIR] [OPTION...]      (--help lists the names and options)
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

data_preparation prepare "${@:---help}"
