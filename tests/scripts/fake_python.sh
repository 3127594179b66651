#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Stands in for Pythons: `python3` is 3.12.1 and answers what the scripts ask, any other does not run.
case "$(basename "$0"):$*" in
    python3:*executable*) echo "$0" ;;
    python3:-V) echo 'Python 3.12.1' ;;
    python3:*) exit 1 ;;
    *) exit 127 ;;
esac
