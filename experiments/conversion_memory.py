# SPDX-License-Identifier: Apache-2.0
"""The memory that converting Llama's weights from others' forms and back takes, measured.

    python experiments/conversion_memory.py [MODEL ...]        (default: llama_bytes llama_1b)

A folder of noise is imported by scripts/convert_llama.py and exported again: the files must be the
same, byte by byte. So is one of Meta's, in bfloat16; PyTorch writes it, and has all of it in memory
for that. Prints for each command its seconds and the most memory of its own (RssAnon in
/proc/PID/status, every 10 ms), in which pages of files do not count: the system takes them back
when it needs them. Needs four times the weights on disk. Exit status: 0, or 1 if files differ.
"""

import argparse
import filecmp
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.llama.architectures import ARCHITECTURES
from models.llama.layer import NORM_EPSILON
from scripts import convert_llama
from workloads.llama31_8b import hugging_face, meta

COMMANDS = ('from-hugging-face', 'to-hugging-face', 'from-meta')


class Noise:
    """A weight with standard normal values, drawn when it is sliced."""

    def __init__(self, shape: tuple[int, ...], rng: np.random.Generator):
        self.shape, self.size, self._rng = shape, math.prod(shape), rng

    def __getitem__(self, piece: slice) -> np.ndarray:
        """Its next values, whatever the slice."""
        rows = len(range(*piece.indices(self.shape[0])))
        return self._rng.standard_normal((rows, *self.shape[1:]), np.float32)


def shapes(model: str) -> Any:
    """Zeros with the shapes of a network's weights, which take no memory."""
    described = hugging_face.described(ARCHITECTURES[model])
    return jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), described)


def make(model: str, folder: Path) -> float:
    """Writes weights of noise as Hugging Face's folder; their GB."""
    folder.mkdir()
    architecture, rng = ARCHITECTURES[model], np.random.default_rng(1)
    described = hugging_face.config(architecture, 'float32')
    (folder / 'config.json').write_text(json.dumps(described))
    weights = {name: Noise(x.shape, rng) for name, x in hugging_face.exported(shapes(model))}
    convert_llama.write_files(folder, weights, np.dtype('float32'))
    return 4e-9 * sum(x.size for x in weights.values())


def make_meta(model: str, folder: Path) -> None:
    """Writes weights of noise as Meta's folder, in bfloat16."""
    import torch

    folder.mkdir()
    a = ARCHITECTURES[model]
    described = {
        'dim': a.width, 'n_layers': a.layers, 'n_heads': a.heads, 'n_kv_heads': a.key_value_heads,
        'vocab_size': a.vocabulary, 'multiple_of': a.feed_forward, 'norm_eps': NORM_EPSILON,
        'rope_theta': a.rotary_base, 'use_scaled_rope': True,
    }  # fmt: skip
    (folder / 'params.json').write_text(json.dumps(described))
    weights = {
        meta.name_of(name): torch.randn(x.shape, dtype=torch.bfloat16)
        for name, x in hugging_face.exported(shapes(model))
    }
    torch.save(weights, folder / convert_llama.META_FILE)


def measured(*arguments: str | Path) -> str:
    """Runs a conversion; what it took."""
    start, most = time.monotonic(), 0
    process = subprocess.Popen(
        [sys.executable, convert_llama.__file__, *arguments], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        status = Path(f'/proc/{process.pid}/status').read_text()
        if found := re.search(r'RssAnon:\s+(\d+) kB', status):
            most = max(most, 1024 * int(found[1]))
        time.sleep(0.01)
    if process.returncode:
        sys.exit(process.returncode)
    return f'{most / 1e9:.2f} GB, {time.monotonic() - start:.0f} s'


def main() -> int:
    """Prints the table; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = tuple(ARCHITECTURES)
    parser.add_argument('models', nargs='*', metavar='MODEL', default=['llama_bytes', 'llama_1b'],
                        help=', '.join(names))  # fmt: skip
    same = True
    columns = 'network', 'weights, fp32', *COMMANDS, 'same files'
    print('|', ' | '.join(columns), '|\n' + '|---' * len(columns) + '|', flush=True)
    for model in parser.parse_args().models:
        with tempfile.TemporaryDirectory(dir='.') as folder:
            theirs, ours, again = (Path(folder) / name for name in ('theirs', 'ours', 'again'))
            size = make(model, theirs)
            taken = [measured(COMMANDS[0], theirs, ours), measured(COMMANDS[1], ours, again)]
            files = [path.name for path in theirs.iterdir() if path.name != 'config.json']
            agree = not any(filecmp.cmpfiles(theirs, again, files, shallow=False)[1:])
            same &= agree
        with tempfile.TemporaryDirectory(dir='.') as folder:
            make_meta(model, Path(folder) / 'meta')
            taken.append(measured(COMMANDS[2], Path(folder) / 'meta', Path(folder) / 'ours'))
        row = (model, f'{size:.3f} GB', *taken, 'yes' if agree else 'no')
        print('|', ' | '.join(row), '|', flush=True)
    return 0 if same else 1


if __name__ == '__main__':
    sys.exit(main())
