# SPDX-License-Identifier: Apache-2.0
"""How fast training batches are made from JPEG records: this pipeline, its ceiling, and its peers.

    python -m speed.input JPEGS [--peers=DIR]

JPEGS is a folder of ImageNet-like files *.JPEG (a few hundred; they stay in the page cache).
--peers names the virtual environment made from speed/requirements-input.txt; without it only this
pipeline and its ceiling run. All run in one go, one after the other in every round; the table has
medians over the rounds, and the CPU time, which other users of the machine disturb less.
speed/input_workers.py says what each contestant does. To use fewer cores: taskset -c 0 python …
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import tensorflow_datasets as tfds

from data_preparation import dataset
from speed.contestants import Contestant, machine

LABELS = {
    'raw': '(a) raw decode + crop + resize, all cores, no framework',
    'ours': '(b) this pipeline, from records to uint8 batches',
    'split': '(b′) the same, in a process per core',
    'tfdata': '(c) tf.data, official recipe, float32 batches',
    'torch': '(d) PyTorch DataLoader with Pillow, uint8 batches',
}


def prepare(jpegs: Path, folder: Path) -> None:
    """Writes the JPEGs to FOLDER/jpegs as files, and to FOLDER/data as records."""
    images = {path.name: path.read_bytes() for path in sorted(jpegs.glob('*.JPEG'))}
    (folder / 'jpegs').mkdir()
    for name, content in images.items():
        (folder / 'jpegs' / name).write_bytes(content)
    examples = [(i, name, content, 0) for i, (name, content) in enumerate(images.items())]
    dataset.prepare(
        'imagenet2012',
        '5.1.0',
        folder / 'data',
        lambda: {'train': examples, 'validation': examples[:1]},
        tfds.features.Image(encoding_format='jpeg'),
        tfds.features.ClassLabel(num_classes=1000),
    )


def main() -> None:
    """Prepares the records, starts the workers, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('jpegs', type=Path)
    parser.add_argument('--peers', type=Path)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batches', type=int, default=8, help='a round')
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--size', type=int, default=224)
    flags = parser.parse_args()
    pythons = dict.fromkeys(('raw', 'ours', 'split'), sys.executable)
    if flags.peers:
        pythons |= dict.fromkeys(('tfdata', 'torch'), f'{flags.peers}/bin/python')
    with tempfile.TemporaryDirectory() as folder:
        prepare(flags.jpegs, Path(folder))
        arguments = folder, str(flags.size), str(flags.batch)
        workers = {
            name: Contestant(
                'speed.input_workers', name, *arguments, python=python, JAX_PLATFORMS='cpu'
            )
            for name, python in pythons.items()
        }
        seconds = [
            {name: worker.ask('batches', flags.batches) for name, worker in workers.items()}
            for _ in range(flags.rounds)
        ]
        for worker in workers.values():
            worker.stop()
    images = flags.batches * flags.batch
    print(f'\n{machine()}; medians of {flags.rounds} interleaved rounds, batches of ', end='')
    print(f'{flags.batch} at {flags.size}\n')
    print('| | images/s | lowest … highest | CPU ms/image | (b) is |\n|---|---|---|---|---|')
    for name in workers:
        rates = [images / times[name][0] for times in seconds]
        cpu = statistics.median(1000 * times[name][1] / images for times in seconds)
        ratio = statistics.median(times[name][0] / times['ours'][0] for times in seconds)
        print(
            f'| {LABELS[name]} | {statistics.median(rates):.0f} | {min(rates):.0f} … '
            f'{max(rates):.0f} | {cpu:.2f} | {ratio:.2f}× |'
        )


if __name__ == '__main__':
    main()
