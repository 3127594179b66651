# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints of Llama to Hugging Face's form and back.

    convert_llama.py to-hugging-face   WORKDIR/checkpoints/STEP OUT_FOLDER [--dtype=bfloat16]
    convert_llama.py from-hugging-face FOLDER OUT_CHECKPOINT

The folder is one that `LlamaForCausalLM.from_pretrained` loads: config.json, and the weights in
.safetensors files of at most 4 GB with an index. fp32, the default, is exact, there and back;
bfloat16 is rounded to the nearest, ties to even. Exit status: 0, or 2 with the output untouched.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'  # A conversion needs no accelerator, which may be in use.

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import safe_open

from models.llama.architectures import ARCHITECTURES, Architecture
from settings.errors import REJECTED, CheckpointError
from training import checkpointing
from workloads.llama31_8b import hugging_face

SHARD_BYTES = 4 * 10**9
INDEX = 'model.safetensors.index.json'
OURS = 'trained_by'  # What config.json says about the training, beside what Hugging Face reads.


def to_hugging_face(checkpoint: Path, out: Path, dtype: str) -> str:
    """Exports a checkpoint and says what was done.

    Raises:
      CheckpointError: it is not one of Llama.
    """
    tree, record = checkpointing.read(checkpoint)
    params = tree['variables']['params']
    try:
        name = hugging_face.identify(params)
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from error
    described = hugging_face.config(ARCHITECTURES[name], dtype)
    described[OURS] = {'step': int(tree['step']), 'config': record.get('config')}
    weights = hugging_face.exported(params)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as folder:
        partial = Path(folder) / out.name
        partial.mkdir()
        count = _write_shards(partial, ((n, x.astype(jnp.dtype(dtype))) for n, x in weights))
        (partial / 'config.json').write_text(json.dumps(described, indent=1) + '\n')
        partial.rename(out)
    return f'{out}: {name} after {int(tree["step"])} steps, {dtype}, {count} file(s)'


def _write_shards(folder: Path, weights: Iterable[tuple[str, np.ndarray]]) -> int:
    """Writes weights and their index; how many files it took."""
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f'shard-{len(shards)}'
        safetensors.numpy.save_file(waiting, path, {'format': 'pt'})
        shards.append(list(waiting))
        waiting.clear()

    for name, array in weights:
        if waiting and size + array.nbytes > SHARD_BYTES:
            flush()
            size = 0
        waiting[name] = np.ascontiguousarray(array)
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f'model-{number + 1:05}-of-{len(shards):05}.safetensors'
        (folder / f'shard-{number}').rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {'metadata': {'total_size': total}, 'weight_map': places}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + '\n')
    return len(shards)


def _files(folder: Path) -> list[Path]:
    """The files of weights, by the index if there is one."""
    if (folder / INDEX).exists():
        places = json.loads((folder / INDEX).read_text())['weight_map']
        return [folder / name for name in sorted(set(places.values()))]
    return [folder / 'model.safetensors']


def _read(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight by its name, as fp32, which holds bfloat16 exactly."""
    for path in _files(folder):
        with safe_open(path, framework='flax') as file:
            for name in file.keys():  # noqa: SIM118  It is no dict.
                yield name, np.asarray(file.get_tensor(name).astype(jnp.float32))


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
    try:
        described = json.loads((folder / 'config.json').read_text())
        architecture = architecture_of(described)
        weights = dict(_read(folder))
        params = hugging_face.imported(weights, architecture.layers)
        name = hugging_face.identify(params)
        trained = described.get(OURS) or {'step': 0, 'config': None}
        step, config = np.int32(trained['step']), trained['config']
    except KeyError as error:
        raise CheckpointError(f'{folder} lacks {error}') from error
    except CheckpointError as error:
        raise CheckpointError(f'{folder}: {error}') from error
    except (
        ValueError, TypeError, AttributeError, ArithmeticError, safetensors.SafetensorError
    ) as error:  # fmt: skip
        raise CheckpointError(f'{folder} is damaged: {checkpointing.first_line(error)}') from error
    wild = [n for n, array in weights.items() if not np.isfinite(array).all()]
    if wild:
        raise CheckpointError(f'{folder}: {wild[0]} is not finite')
    tree = {'variables': {'params': params}, 'step': step}
    record = {'step': int(step), 'config': config, 'source': {'folder': folder.name}}
    checkpointing.write(out, tree, record)
    return f'{out}: {name}, after {step} steps'


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    export = commands.add_parser('to-hugging-face')
    export.add_argument('source', metavar='CHECKPOINT', type=Path)
    export.add_argument('out', metavar='OUT_FOLDER', type=Path)
    export.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    importer = commands.add_parser('from-hugging-face')
    importer.add_argument('source', metavar='FOLDER', type=Path)
    importer.add_argument('out', metavar='OUT_CHECKPOINT', type=Path)
    flags = parser.parse_args(arguments)
    try:
        if flags.out.exists():
            raise FileExistsError(f'{flags.out} exists; move it away or choose another output')
        if flags.command == 'to-hugging-face':
            done = to_hugging_face(flags.source, flags.out, flags.dtype)
        else:
            done = from_hugging_face(flags.source, flags.out)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return REJECTED
    print(done)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
