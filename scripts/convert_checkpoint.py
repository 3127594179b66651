# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints to PyTorch's form and back, under torchvision's names.

    convert_checkpoint.py to-pytorch   WORKDIR/checkpoints/STEP OUT.safetensors   (or OUT.pth)
    convert_checkpoint.py from-pytorch IN.safetensors OUT_CHECKPOINT              (or IN.pth)
    convert_checkpoint.py download     URL OUT_CHECKPOINT

Which input the PyTorch side takes:
--input=reference: RGB in 0..255 minus the means (123.68, 116.78, 103.94), as here. The values are
copied as they are, bit for bit.
--input=torchvision: that of torchvision's published weights, (RGB / 255 - mean) / std. The scale is
folded into the first convolution; the difference of the means, up to 0.5 grey levels, stays.

to-pytorch writes it into the file (default: reference), and from-pytorch reads it there. For files
that do not say, from-pytorch needs the flag.

`download` fetches weights whose name ends in the first digits of their SHA-256, as torchvision's
do, and converts them with --input=torchvision. Exit status: 0, or 2 with the output untouched.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'  # A conversion needs no accelerator, which may be in use.

import numpy as np

from data_preparation import archives
from settings import hyperparameters
from settings.errors import REJECTED, CheckpointError
from training import checkpointing
from workloads import weight_files
from workloads.resnet import torchvision
from workloads.resnet.fields import ResNetConfig
from workloads.resnet.image_preprocessing import CENTRAL_FRACTION
from workloads.resnet.task import CHANNEL_MEANS
from workloads.resnet.torchvision import TORCHVISION_MEAN, TORCHVISION_SCALE, TORCHVISION_STD

CONVENTIONS = {
    'reference': f'RGB in 0..255 minus {CHANNEL_MEANS}, as this program trains',
    'torchvision': "(RGB / 255 - mean) / std, as torchvision's published weights and most others",
}
LARGEST_STEP = 2**31 - 1  # The optimizer counts in int32.
_USED = ('model', 'padding', 'image_size', 'augmentation')  # Of a configuration, here.


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file or checkpoint that an error is about in front of it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error


def preprocessing(config: Mapping[str, Any] | None, convention: str) -> dict[str, Any]:
    """How images are to be prepared for the exported network, for the file's metadata.

    With torchvision's scale folded in, our own means are still the exact ones.
    """
    folded = convention == 'torchvision'
    facts: dict[str, Any] = {
        'channels': 'RGB',
        'layout': 'NCHW',
        'divide_by': 255 if folded else 1,
        'mean': [mean / 255 if folded else mean for mean in CHANNEL_MEANS],
        'std': TORCHVISION_STD if folded else (1.0, 1.0, 1.0),
    }
    if config:
        facts['image_size'] = config['image_size']
        if config['augmentation'] == 'crop_resize':
            facts['resize_shorter_side'] = round(config['image_size'] / CENTRAL_FRACTION)
            facts['resize_rule'] = (
                'bilinear without antialiasing; output pixel i samples input i·(in/out); centre '
                'crop'
            )
    return facts


def to_pytorch(checkpoint: Path, out: Path, convention: str) -> str:
    """Exports a checkpoint and says what was done.

    CheckpointError if it is no whole model with finite weights, or has padding='same', which no
    PyTorch model has.
    """
    with _naming(checkpoint):
        tree, record = checkpointing.read(checkpoint)
        step, config = int(tree['step']), record.get('config')
        check_config(config)
        state = torchvision.to_state_dict(tree['variables'], step)
        model = torchvision.identify(state)
        torchvision.from_state_dict(state, model)  # Raises unless it is a whole model.
    if convention == 'torchvision':
        state = torchvision.scale_input(state, TORCHVISION_SCALE)
    metadata = {
        'model': model,
        'step': str(step),
        'input': convention,
        'preprocessing': json.dumps(preprocessing(config, convention)),
        'config': json.dumps(config),
    }
    weight_files.write(out, state, metadata)
    return f'{out}: {model} after {step} steps. {_note(convention)}'


def check_config(config: Any) -> None:
    """Checks what is used here of a configuration that a checkpoint or a file may carry."""
    if config is None:
        return
    if not isinstance(config, Mapping):
        raise CheckpointError(f'its config is {config!r:.100}, which is no object of names')
    fields = hyperparameters.table(ResNetConfig)
    for name in _USED:
        value, field = config.get(name), fields[name]
        if type(value) is not field.type or not field.rule.holds(value):
            raise CheckpointError(
                f'its config has {name}={value!r:.100}; it must be {field.rule.words}'
            )
    if config['padding'] != 'symmetric':
        raise CheckpointError(
            f"its config has padding={config['padding']!r}; PyTorch's models pad symmetrically "
            "and would compute something else. Train with padding='symmetric' to export"
        )


def check_metadata(
    metadata: Mapping[str, str], model: str, convention: str | None
) -> tuple[int, Mapping[str, Any] | None, str]:
    """What the metadata of a file say: (step, configuration or None, input).

    CheckpointError names a value that is wrong, or that contradicts the weights, which are those of
    `model`, or the user, who names the input `convention` or leaves it to the file.
    """
    step = metadata.get('step', '0')
    if not re.fullmatch('[0-9]{1,10}', step) or int(step) > LARGEST_STEP:
        raise CheckpointError(f'its step is {step!r:.100}; it must be 0 to {LARGEST_STEP}')
    try:
        config = json.loads(metadata.get('config', 'null'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'its config is no JSON: {error}') from error
    check_config(config)
    for where, said in (('model', metadata), ('config', config or {})):
        if said.get('model', model) != model:
            raise CheckpointError(
                f'its {where} says {said["model"]!r:.100}, but its weights are those of {model}'
            )
    recorded = metadata.get('input', convention)
    if recorded is None:
        inputs = '\n  '.join(f'--input={name}: {words}' for name, words in CONVENTIONS.items())
        raise CheckpointError(
            f'it does not say which input its weights are made for; add one of\n  {inputs}'
        )
    if recorded not in CONVENTIONS:
        raise CheckpointError(
            f'its input is {recorded!r:.100}; it must be one of {", ".join(CONVENTIONS)}'
        )
    if convention not in (None, recorded):
        raise CheckpointError(
            f'its weights are made for input={recorded}, by its metadata, which '
            f'--input={convention} contradicts; leave that out'
        )
    return int(step), config, recorded


def from_pytorch(file: Path, out: Path, convention: str | None) -> str:
    """Imports a file and says what was done; raises as the functions it calls."""
    state, metadata = weight_files.read(file)
    with _naming(file):
        model = torchvision.identify(state)
        variables = torchvision.from_state_dict(state, model)
        step, config, convention = check_metadata(metadata, model, convention)
        if convention == 'torchvision':
            inverse = tuple(1 / factor for factor in TORCHVISION_SCALE)
            state = torchvision.scale_input(state, inverse)
            variables = torchvision.from_state_dict(state, model)
    source = {'file': file.name, 'input': convention}
    tree = {'variables': variables, 'step': np.int32(step)}
    checkpointing.write(out, tree, {'step': step, 'config': config, 'source': source})
    return f'{out}: {model}, {state["fc.weight"].shape[0]} classes. {_note(convention)}'


def _note(convention: str) -> str:
    if convention == 'reference':
        return f'Input: RGB in 0..255 minus {CHANNEL_MEANS}.'
    # A torchvision input is one of ours, shifted by this many grey levels.
    means = zip(TORCHVISION_MEAN, CHANNEL_MEANS, strict=True)
    shifts = ', '.join(f'{255 * theirs - ours:+.3f}' for theirs, ours in means)
    exact = ', '.join(f'{mean / 255:.6f}' for mean in CHANNEL_MEANS)
    return (
        "Torchvision's scale was folded into conv1.weight. The means cannot be folded (the "
        'padding would shift too): on the PyTorch side, Normalize(mean='
        f"({exact}), std={TORCHVISION_STD}) is exact; with torchvision's own mean the input is off "
        f'by ({shifts}) grey levels.'
    )


def download(url: str, out: Path) -> str:
    """Fetches weights next to `out`, checks them by the digits in their name, and converts them.

    An interrupted download is resumed; the file stays, so that nothing is fetched twice, unless the
    digits are not those of its SHA-256. ValueError if it cannot be fetched.
    """
    archives.check_url(url)
    name = url.rsplit('/', 1)[-1]
    digits = re.search(r'-([0-9a-f]{8,64})\.(pth|safetensors)$', name)
    if not digits:
        raise CheckpointError(
            f'{archives.redacted(url)} does not end in the first digits of its SHA-256, like '
            'resnet50-0676ba61.pth: what would be fetched could not be checked'
        )
    file = out.parent / name
    if not file.exists():
        archives.download(url, file)
    with file.open('rb') as stream:
        digest = hashlib.file_digest(stream, 'sha256').hexdigest()
    if not digest.startswith(digits[1]):
        file.unlink()
        raise CheckpointError(
            f'{file} has the SHA-256 {digest}, not {digits[1]}…: it was removed; fetch it again'
        )
    return from_pytorch(file, out, 'torchvision')


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for command, source, target in (
        ('to-pytorch', 'CHECKPOINT', 'OUT.{safetensors,pth}'),
        ('from-pytorch', 'IN', 'OUT_CHECKPOINT'),
        ('download', 'URL', 'OUT_CHECKPOINT'),
    ):
        subparser = commands.add_parser(command)
        subparser.add_argument('source', metavar=source)
        subparser.add_argument('out', metavar=target, type=Path)
        if command != 'download':
            subparser.add_argument('--input', choices=tuple(CONVENTIONS))
    flags = parser.parse_args(arguments)
    try:
        if flags.out.exists():
            raise FileExistsError(f'{flags.out} exists; move it away or choose another output')
        if flags.command == 'to-pytorch':
            done = to_pytorch(Path(flags.source), flags.out, flags.input or 'reference')
        elif flags.command == 'from-pytorch':
            done = from_pytorch(Path(flags.source), flags.out, flags.input)
        else:
            done = download(flags.source, flags.out)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return REJECTED
    print(done)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
