# SPDX-License-Identifier: Apache-2.0
"""How fast training batches are made from JPEG records: this pipeline, its ceiling, and its peers.

    python speed/input_pipeline.py --jpegs FOLDER [--peers DIR] [--rounds 7] [--threads 1,2]

--jpegs names a folder of ImageNet-like JPEGs `SYNSET_*.JPEG` (a few hundred; they stay in memory).
--peers names the virtual environment made from speed/requirements-input.txt; without it only
this pipeline and its ceiling run. All run in one go, one after the other in every round; the table
has medians over the rounds, and the CPU time, which other users of the machine disturb less.
speed/input_workers.py says what each contestant does. --threads repeats ours on fewer cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

from data_preparation import imagenet, imagenet_archives  # noqa: E402
from speed.machine import machine  # noqa: E402
from tests.ilsvrc_archives import write_archives  # noqa: E402

LABELS = {
    'raw': '(a) raw decode + crop + resize, all cores, no framework',
    'ours': '(b) this pipeline, from records to uint8 batches',
    'tfdata': '(c) tf.data, official recipe, float32 batches',
    'torch': '(d) PyTorch DataLoader with Pillow, uint8 batches',
}


class Worker:
    """A contestant in a process of its own, idle until it is told to make batches."""

    def __init__(
        self, name: str, python: str, folder: Path, size: int, batch: int, cores: set[int]
    ):
        self.process = subprocess.Popen(
            [python, '-m', 'speed.input_workers', name, folder, str(size), str(batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        while (line := self.process.stdout.readline()) != 'ready\n':
            if not line:
                raise SystemExit(f'error: {name} did not start with {python}')

    def run(self, batches: int) -> tuple[float, float]:
        """Makes batches; wall and CPU seconds."""
        print(batches, file=self.process.stdin, flush=True)
        wall, cpu = map(float, self.process.stdout.readline().split())
        return wall, cpu

    def stop(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def prepare(jpegs: Path, folder: Path) -> None:
    """Lays the JPEGs out as files, and as records with the code that prepares ImageNet."""
    images = {path.name: path.read_bytes() for path in sorted(jpegs.glob('*.JPEG'))}
    (folder / 'jpegs').mkdir()
    for name, content in images.items():
        (folder / 'jpegs' / name).write_bytes(content)
    train = {f'{name.split("_")[0]}_{i}.JPEG': v for i, (name, v) in enumerate(images.items())}
    few = list(images.values())[:2]
    validation = {f'ILSVRC2012_val_{i:08d}.JPEG': v for i, v in enumerate(few, start=1)}
    facts = write_archives(folder / 'archives', train, validation, shards=8)
    sources = imagenet_archives.read_sources(facts)
    imagenet.prepare(folder / 'data', folder / 'archives', sources, workers=2)


def measure(workers: dict[str, Worker], rounds: int, batches: int, batch: int):
    """Runs all workers in turn; per worker the list of (images/s, CPU milliseconds an image)."""
    results = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            wall, cpu = worker.run(batches)
            results[name].append((batches * batch / wall, 1000 * cpu / (batches * batch)))
    return results


def main() -> None:
    """Prepares the records, starts the workers, measures, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--jpegs', type=Path, required=True)
    parser.add_argument('--peers', type=Path)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batches', type=int, default=8, help='a round')
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--threads', help='core counts to repeat ours on, such as 1,2,4')
    flags = parser.parse_args()
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        prepare(flags.jpegs, Path(folder))

        def start(name: str, some_cores: set[int]) -> Worker:
            python = sys.executable if name in ('raw', 'ours') else f'{flags.peers}/bin/python'
            return Worker(name, python, Path(folder), flags.size, flags.batch, some_cores)

        names = list(LABELS) if flags.peers else ['raw', 'ours']
        workers = {name: start(name, cores) for name in names}
        results = measure(workers, flags.rounds, flags.batches, flags.batch)
        for worker in workers.values():
            worker.stop()
        print(f'\n{machine()}; medians of {flags.rounds} interleaved rounds, batches of ', end='')
        print(f'{flags.batch} at {flags.size}\n')
        print('| | images/s | lowest … highest | CPU ms/image | (b) is |\n|---|---|---|---|---|')
        rate = {n: statistics.median(r for r, _ in results[n]) for n in names}
        for name in names:
            rates, cpu = zip(*results[name], strict=True)
            ratio = statistics.median(
                b / r for (b, _), r in zip(results['ours'], rates, strict=True)
            )
            print(
                f'| {LABELS[name]} | {rate[name]:.0f} | {min(rates):.0f} … {max(rates):.0f} '
                f'| {statistics.median(cpu):.2f} | {ratio:.2f}× |'
            )
        if flags.threads:
            print('\n| cores | (b), images/s | CPU ms/image |\n|---|---|---|')
            counts = [int(n) for n in flags.threads.split(',')]
            workers = {str(n): start('ours', set(sorted(cores)[:n])) for n in counts}
            for n, values in measure(workers, flags.rounds, flags.batches, flags.batch).items():
                rates, cpu = zip(*values, strict=True)
                print(f'| {n} | {statistics.median(rates):.0f} | {statistics.median(cpu):.2f} |')
            for worker in workers.values():
                worker.stop()


if __name__ == '__main__':
    main()
