#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fetches torchvision's ResNet-50 weights, checks them by the digits of the SHA-256 in their name, and
# converts them to a checkpoint to start from: main.py … --config.init_from=OUT
#
# Usage: scripts/download_checkpoint.sh OUT [URL]
#   OUT  the checkpoint's folder; the fetched file is kept beside it
#   URL  default: https://download.pytorch.org/models/resnet50-0676ba61.pth
#        (IMAGENET1K_V1); any file of the same architecture named NAME-DIGITS.pth or .safetensors
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case "${1:-}" in
    -h | --help | '') print_help; exit ;;
esac
[[ $# -le 2 ]] || die "too many arguments; see scripts/download_checkpoint.sh --help"
url="${2:-https://download.pytorch.org/models/resnet50-0676ba61.pth}"

if [[ "$url" == *.pth ]]; then # These are read by PyTorch.
    use_test_environment
    "$ROOT/scripts/setup_env.sh" --cpu --test
else
    "$ROOT/scripts/setup_env.sh"
fi
exec "$VENV/bin/python" "$ROOT/scripts/convert_checkpoint.py" download "$url" "$1"
