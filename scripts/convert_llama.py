# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints of Llama to Hugging Face's form and back, and from Meta's.

    convert_llama.py to-hugging-face   WORKDIR/checkpoints/STEP OUT_FOLDER [--dtype=bfloat16]
    convert_llama.py from-hugging-face FOLDER OUT_CHECKPOINT
    convert_llama.py from-meta         FOLDER OUT_CHECKPOINT

Hugging Face's folder is one that `LlamaForCausalLM.from_pretrained` loads: config.json, and the
weights in .safetensors files of at most 4 GB with an index. fp32, the default, is exact, there and
back; bfloat16 is rounded to the nearest, ties to even. Meta's has params.json and
consolidated.00.pth, which PyTorch reads. Weights are read and written in pieces, so that memory
does not depend on the network; an import needs as much room again beside the output, for a while.
Exit status: 0, or 2 with the output untouched.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'  # A conversion needs no accelerator, which may be in use.

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import safe_open

from models.llama.architectures import ARCHITECTURES, Architecture
from settings.errors import REJECTED, CheckpointError
from training import checkpointing
from workloads import weight_files
from workloads.llama31_8b import hugging_face, meta

FILE_BYTES = 4 * 10**9
DTYPES = {'float32': 'F32', 'bfloat16': 'BF16'}
INDEX = 'model.safetensors.index.json'
OURS = 'trained_by'  # What config.json says about the training, beside what Hugging Face reads.
NOT_OURS = {'step': 0, 'config': None}
META_FILE = 'consolidated.00.pth'

Empty = Callable[[Sequence[int]], np.ndarray]  # Makes an fp32 array of a shape.


def to_hugging_face(checkpoint: Path, out: Path, dtype: str) -> str:
    """Exports a checkpoint and says what was done.

    Raises:
      CheckpointError: it is not one of Llama.
    """
    try:
        stored = checkpointing.Stored(checkpoint, threads=1)
        params = stored.unread().get('variables', {}).get('params')
        name = hugging_face.identify(params)
        stored.check(stored.described())
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from error
    step = int(stored.read('step'))
    described = hugging_face.config(ARCHITECTURES[name], dtype)
    described[OURS] = {'step': step, 'config': stored.record.get('config')}
    with _temporary(out) as folder:
        partial = folder / out.name
        partial.mkdir()
        count = write_files(partial, dict(hugging_face.exported(params)), jnp.dtype(dtype))
        (partial / 'config.json').write_text(json.dumps(described, indent=1) + '\n')
        partial.rename(out)
    return f'{out}: {name} after {step} steps, {dtype}, {count} file(s)'


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is not yet whole."""
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as folder:
        yield Path(folder)


def write_files(folder: Path, weights: Mapping[str, Any], dtype: np.dtype) -> int:
    """Writes weights, in their order, and their index; how many files it took."""
    files: list[list[str]] = []
    sizes = {name: x.size * dtype.itemsize for name, x in weights.items()}
    room = 0
    for name, size in sizes.items():
        if not files or size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(name)
        room -= size
    places: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f'model-{number + 1:05}-of-{len(files):05}.safetensors'
        _write_file(folder / file, {name: weights[name] for name in names}, dtype)
        places |= dict.fromkeys(names, file)
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': places}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + '\n')
    return len(files)


def _write_file(path: Path, weights: Mapping[str, Any], dtype: np.dtype) -> None:
    """Writes a .safetensors file in pieces; the library that reads them writes whole ones alone.

    The length of a header, 64 bits, the header, JSON, and the arrays' bytes
    (github.com/huggingface/safetensors, README, "Format").
    """
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name, x in weights.items():
        begin, end = end, end + x.size * dtype.itemsize
        header[name] = {
            'dtype': DTYPES[dtype.name],
            'shape': list(x.shape),
            'data_offsets': [begin, end],
        }
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with path.open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for x in weights.values():
            for piece in checkpointing.pieces(x.shape, np.float32):
                np.ascontiguousarray(x[piece], dtype).tofile(file)


class Weight:
    """An array in a file, read when it is sliced, as fp32, which holds half precision exactly.

    Args:
      name: in its file.
      shape: of all of it.
      read: gives a piece as NumPy's fp32 array.
    """

    def __init__(self, name: str, shape: Sequence[int], read: Callable[[Any], np.ndarray]):
        self.shape, self._name, self._read = tuple(shape), name, read

    def __getitem__(self, piece: Any) -> np.ndarray:
        """A piece of it.

        Raises:
          CheckpointError: it has values that are not finite.
        """
        values = self._read(piece)
        if not np.isfinite(values).all():
            raise CheckpointError(f'{self._name} is not finite')
        return values

    @classmethod
    def of_safetensors(cls, name: str, file: Any) -> 'Weight':
        """One of a file that `safe_open` opened."""
        stored = file.get_slice(name)
        shape = stored.get_shape()
        return cls(name, shape, lambda piece: np.asarray(stored[piece].astype(jnp.float32)))

    @classmethod
    def of_tensor(cls, name: str, tensor: Any) -> 'Weight':
        """One of PyTorch's."""
        return cls(name, tensor.shape, lambda piece: tensor[piece].float().numpy())


def _weights(folder: Path) -> dict[str, Weight]:
    """Every weight by its name, in the files of the index, if there is one."""
    files = ['model.safetensors']
    if (folder / INDEX).exists():
        files = sorted(set(json.loads((folder / INDEX).read_text())['weight_map'].values()))
    opened = [safe_open(folder / name, framework='flax') for name in files]
    return {n: Weight.of_safetensors(n, file) for file in opened for n in file.keys()}  # noqa: SIM118


def architecture_of(described: Mapping[str, Any]) -> Architecture:
    """The network that a config.json describes.

    Raises:
      CheckpointError: it is none of those that are known here.
    """
    known = dict(described)
    known.setdefault('head_dim', known['hidden_size'] // known['num_attention_heads'])
    if 'rope_parameters' in known:  # As transformers writes them from version 5 on.
        known['rope_scaling'] = dict(known['rope_parameters'])
        known['rope_theta'] = known['rope_scaling'].pop('rope_theta')
    for architecture in ARCHITECTURES.values():
        ours = hugging_face.config(architecture, 'float32')
        names = [n for n in ours if n not in ('torch_dtype', 'architectures')]
        if all(known.get(n) == ours[n] for n in names):
            return architecture
    raise CheckpointError(
        f'its config.json describes none of the networks {", ".join(ARCHITECTURES)}'
    )


def from_hugging_face(folder: Path, out: Path) -> str:
    """Imports a folder and says what was done.

    Raises:
      CheckpointError: it is not whole, or of another network.
    """

    def read(empty: Empty) -> tuple[Any, Mapping[str, Any]]:
        described = json.loads((folder / 'config.json').read_text())
        params = hugging_face.imported(_weights(folder), architecture_of(described), empty)
        return params, described.get(OURS) or NOT_OURS

    return _imported(folder, out, read)


def from_meta(folder: Path, out: Path) -> str:
    """Imports a folder of Meta's and says what was done.

    Raises:
      CheckpointError: as `from_hugging_face`.
    """

    def read(empty: Empty) -> tuple[Any, Mapping[str, Any]]:
        files = sorted(path.name for path in folder.glob('consolidated.*.pth'))
        if files != [META_FILE]:
            raise CheckpointError(
                f'there must be one file {META_FILE}, and there are {len(files)} of such a name; '
                'several hold parts of each weight, for as many GPUs, and are not read'
            )
        architecture = meta.architecture_of(json.loads((folder / 'params.json').read_text()))
        tensors = weight_files.mapped(folder / META_FILE)
        weights = {name: Weight.of_tensor(name, tensor) for name, tensor in tensors.items()}
        weights = meta.reordered(weights, architecture)
        return hugging_face.imported(weights, architecture, empty, meta.name_of), NOT_OURS

    return _imported(folder, out, read)


def _imported(
    folder: Path, out: Path, read: Callable[[Empty], tuple[Any, Mapping[str, Any]]]
) -> str:
    """Writes the weights that `read` gives, and what config.json says of their training."""
    with _temporary(out) as temporary:
        numbers = itertools.count()

        def on_disk(shape: Sequence[int]) -> np.ndarray:
            path = temporary / str(next(numbers))
            return np.memmap(path, np.float32, 'w+', shape=tuple(shape))

        try:
            params, trained = read(on_disk)
            step, config = np.int32(trained['step']), trained['config']
        except KeyError as error:
            raise CheckpointError(f'{folder} lacks {error}') from error
        except CheckpointError as error:
            raise CheckpointError(f'{folder}: {error}') from error
        except (
            ValueError, TypeError, AttributeError, ArithmeticError, safetensors.SafetensorError
        ) as error:  # fmt: skip
            what = checkpointing.first_line(error)
            raise CheckpointError(f'{folder} is damaged: {what}') from error
        tree = {'variables': {'params': params}, 'step': step}
        record = {'step': int(step), 'config': config, 'source': {'folder': folder.name}}
        checkpointing.write(out, tree, record)
    return f'{out}: {hugging_face.identify(params)}, after {step} steps'


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    export = commands.add_parser('to-hugging-face')
    export.add_argument('source', metavar='CHECKPOINT', type=Path)
    export.add_argument('out', metavar='OUT_FOLDER', type=Path)
    export.add_argument('--dtype', choices=DTYPES, default='float32')
    importers = {'from-hugging-face': from_hugging_face, 'from-meta': from_meta}
    for command in importers:
        importer = commands.add_parser(command)
        importer.add_argument('source', metavar='FOLDER', type=Path)
        importer.add_argument('out', metavar='OUT_CHECKPOINT', type=Path)
    flags = parser.parse_args(arguments)
    try:
        if flags.out.exists():
            raise FileExistsError(f'{flags.out} exists; move it away or choose another output')
        if flags.command == 'to-hugging-face':
            done = to_hugging_face(flags.source, flags.out, flags.dtype)
        else:
            done = importers[flags.command](flags.source, flags.out)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return REJECTED
    print(done)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
