# SPDX-License-Identifier: Apache-2.0
"""main.py with the dummy workload among its benchmarks."""

import sys

import main
from tests import dummy_workload
from workloads import by_name

by_name.BENCHMARKS['dummy'] = by_name.Entry(dummy_workload.DummyConfig, dummy_workload.__name__)
if __name__ == '__main__':  # Not in decoding processes.
    sys.exit(main.main(sys.argv[1:]))
