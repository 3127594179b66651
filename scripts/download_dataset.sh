#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Downloads and prepares a dataset; does nothing if it is there, and resumes what was interrupted.
#
# Usage: scripts/download_dataset.sh {digits | cifar10 | imagenet} [DIR] [OPTION...]
#   DIR   the root of all data (default: data in the repository); the dataset goes to DIR/NAME/VERSION
#
# cifar10:  --from PATH          a folder train|test/CLASS/*.jpg, or a tar of one, instead of the download
# imagenet: --archives_dir PATH  the folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar
#                                (default: DIR/downloads/manual); ImageNet requires registration, see docs/data.md
#           --url URL            download the archives that are missing from this folder, with the name and
#                                password in IMAGENET_USER and IMAGENET_PASSWORD if the server asks for them
#           --sources FILE       JSON with sizes and checksums of other archives of this structure
#           --workers N          threads (default: one per core)
#
# Exit status: 0 prepared, 2 error, 130 stopped by Ctrl-C.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dataset_arguments "$@"
data_preparation "${name%2012}" --data_dir="$data_dir" "${options[@]}"
