# SPDX-License-Identifier: Apache-2.0
"""The time, memory and disk that the order of a run of the Llama benchmark takes, at its real size.

    python experiments/order_size.py [--documents=45608612] [--tokens=20e9] FOLDER

FOLDER gets an index of as many documents as are in C4's training shards 768 to 895, an eighth of
all, with lengths drawn from a lognormal distribution, and files of tokens that have their size and
nothing in them; the order of configs/llama31_8b.py is made of it, and some sequences read. Prints
seconds, the process's greatest memory (VmHWM in /proc/PID/status) and the size of the order.
"""

import argparse
import multiprocessing
import re
import time
from pathlib import Path

import numpy as np

from input_pipeline import Share
from settings import loading
from workloads import by_name
from workloads.llama31_8b import token_files
from workloads.llama31_8b.datasets import FILES
from workloads.llama31_8b.workload import WORKLOAD

SPREAD = 1.0  # Standard deviation of the lengths' logarithm.
TOKEN = np.dtype('<i4')


def make(folder: Path, documents: int, tokens: float) -> None:
    """Writes files whose tokens are all 0, and take no place where files may have holes."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.random.default_rng(1).lognormal(sigma=SPREAD, size=documents)
    lengths = np.maximum(lengths * (tokens / lengths.sum()), 1).astype(np.int32)
    evaluated = np.full(2**15, 300, np.int32)
    for prefix, each in zip(FILES['c4'][:2], (lengths, evaluated), strict=True):
        token_files.write_index(folder / f'{prefix}.idx', each, TOKEN)
        with (folder / f'{prefix}.bin').open('wb') as file:
            file.truncate(int(each.sum(dtype=np.int64)) * TOKEN.itemsize)


def measure(folder: Path) -> None:
    """Makes the order, reads a batch, prints what it took."""
    fields = {'division': 'open', 'seed': 1, 'data_dir': str(folder)}
    config = by_name.configure(dict(loading.load('configs/llama31_8b.py')) | fields, {})
    corpus = WORKLOAD.data(config)
    for what in ('made', 'found'):
        before, used = time.monotonic(), time.process_time()
        pipeline = WORKLOAD.pipeline(config, corpus, 1, Share(0, 32, 32))
        next(iter(pipeline.train(0, 1)))
        seconds = f'{time.monotonic() - before:.0f} s, {time.process_time() - used:.0f} s of a core'
        status = Path('/proc/self/status').read_text()
        (most,) = re.findall(r'VmHWM:\s+(\d+) kB', status)
        print(f'{what}, with a batch of 32: {seconds}; so far {int(most) * 1024 / 1e9:.2f} GB')
    size = sum(path.stat().st_size for path in folder.rglob('orders/*/*'))
    print(f'{corpus.num_train:,} sequences an epoch; the order on disk: {size / 1e9:.2f} GB')


def main() -> None:
    """The program; what is measured has a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, metavar='FOLDER')
    parser.add_argument('--documents', type=int, default=45_608_612)
    parser.add_argument('--tokens', type=float, default=20e9)
    flags = parser.parse_args()
    make(flags.folder / 'c4', flags.documents, flags.tokens)
    process = multiprocessing.get_context('spawn').Process(target=measure, args=(flags.folder,))
    process.start()
    process.join()


if __name__ == '__main__':
    main()
