# SPDX-License-Identifier: Apache-2.0
"""Throughput of the input pipeline on CIFAR-10: decoding one by one, and kept in memory.

    python -m speed.cached_input DATA_DIR [--images=N]

Prints images per second of wall-clock and of CPU time (all threads of this process): the first on a
quiet machine, the second also on a busy one. No training step runs beside it.
"""

import argparse
import itertools
import time
from collections.abc import Iterable

from configs import cifar10
from input_pipeline import Pipeline, Share, find_dataset
from settings import hyperparameters
from speed.machine import machine

BATCH = 512


def measure(name: str, batches: Iterable, count: int) -> None:
    """Takes so many batches and prints how fast they came."""
    wall, cpu = time.perf_counter(), time.process_time()
    images = sum(len(batch['label']) for batch in itertools.islice(batches, count))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f'{name}: {images} images, {images / wall:.0f} images/s, {images / cpu:.0f} per CPU s')


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data_dir')
    parser.add_argument('--images', type=int, default=50_000, help='of every measurement')
    flags = parser.parse_args()
    count = -(-flags.images // BATCH)
    dataset = find_dataset('cifar10', flags.data_dir)
    for gib in ('0', '1'):
        fields = {'data_dir': flags.data_dir, 'cache_gib': gib}
        config = hyperparameters.resolve(cifar10.get_config(), fields)
        pipeline = Pipeline(dataset, config, 1, Share(0, BATCH, BATCH))
        for repetition in (1, 2):
            # The same batches both times: by the second the cache has all of their images.
            measure(f'cache_gib={gib}, pass {repetition}', pipeline.train(0, count), count)
    print(machine())


if __name__ == '__main__':
    main()
