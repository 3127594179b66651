# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on."""

import os
import platform
import time
from pathlib import Path


def machine() -> str:
    """The processor, its cores here, their load, and the date."""
    try:
        text = Path('/proc/cpuinfo').read_text()
        model = text.split('model name')[1].splitlines()[0].strip('\t: ')
    except (OSError, IndexError):
        model = platform.processor()
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f'{model}, {cores} cores, load {load:.1f}, {time.strftime("%Y-%m-%d")}'
