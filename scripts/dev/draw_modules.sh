#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Draws docs/modules.svg, the picture of the modules, from docs/modules.dot.
#
# Usage: scripts/dev/draw_modules.sh
#
# Needs Graphviz; the drawing was made with version 2.43.0 (Debian's graphviz 2.42.2-7) and the font DejaVu Sans.
# With these it is the same file every time; others may place text differently.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

case "${1:-}" in
    '') ;;
    -h | --help) print_help; exit ;;
    *) die "unknown argument $1; $0 --help lists the known ones" ;;
esac
command -v dot > /dev/null || die 'Graphviz is missing: apt-get install graphviz'
cd "$ROOT/docs"

drawing="$(dot -Tsvg modules.dot)"
{
    printf '%s\n' "$drawing"
    printf '<!-- SHA-256 of modules.dot: %s -->\n' "$(sha256sum modules.dot | cut -d ' ' -f 1)"
} > modules.svg
