# SPDX-License-Identifier: Apache-2.0
"""Continues a text with a checkpoint of Llama.

    generate.py CHECKPOINT 'Fellow citizens' [--tokens=200] [--temperature=0.7] [--seed=0]
        [--tokenizer=tokenizer.json]

CHECKPOINT is WORKDIR/checkpoints/STEP, or a work directory, which stands for its newest. Without
--tokenizer the bytes of the text are its tokens, as for configs/speeches.py; a tokenizer.json is
read by the package `tokenizers` of requirements-tools.txt. Each new token recomputes the whole
window, at most one training sequence, which is slow for a large network. Exit status: 0, or 2 for
invalid input.
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np

from models.llama import network
from models.llama.architectures import ARCHITECTURES, Architecture
from models.llama.layer import Layer
from scripts.fingerprint import newest
from settings.errors import REJECTED
from training import checkpointing
from workloads.llama31_8b import hugging_face

END_OF_DOCUMENT = 256  # Of the speeches.


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...


class Bytes:
    """Every byte of a text is a token, and `END_OF_DOCUMENT` ends one."""

    def encode(self, text: str) -> Sequence[int]:
        """See `Tokenizer`."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Tokenizer`; what is no UTF-8 is replaced."""
        return bytes(t for t in tokens if t < END_OF_DOCUMENT).decode(errors='replace')


class File:
    """A tokenizer.json."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer as Read
        except ImportError as error:
            raise ValueError(
                '--tokenizer needs the package tokenizers; scripts/setup_env.sh installs it'
            ) from error
        try:
            self._tokenizer = Read.from_str(path.read_text())
        except Exception as error:  # The package raises nothing more specific.
            raise ValueError(f'{path} is not a tokenizer.json: {error}') from error

    def encode(self, text: str) -> Sequence[int]:
        """See `Tokenizer`."""
        tokens: Sequence[int] = self._tokenizer.encode(text).ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Tokenizer`."""
        text: str = self._tokenizer.decode(list(tokens))
        return text


@functools.partial(jax.jit, static_argnames='architecture')
def _next(
    params: Any,
    window: jax.Array,
    count: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    architecture: Architecture,
) -> jax.Array:
    """A token drawn after the first `count` of a window; the likeliest at temperature 0."""
    x = network.activations(params, window[None], Layer(architecture, jnp.dtype('float32')))
    scores = network.logits(x[0, count - 1], params['head'])
    drawn = jax.random.categorical(key, scores / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, scores.argmax())


def continuation(
    params: Any,
    architecture: Architecture,
    tokens: Sequence[int],
    *,
    count: int,
    length: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """So many tokens that follow some, each from the last `length` before it."""
    text, window = list(tokens), np.zeros(length, np.int32)  # One shape, and so one program.
    for place in range(len(text), len(text) + count):
        last = text[-length:]
        window[: len(last)] = last
        key = jax.random.fold_in(jax.random.key(seed), place)
        text.append(int(_next(params, window, len(last), key, temperature, architecture)))
    return text[len(tokens) :]


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT')
    parser.add_argument('text', metavar='TEXT')
    parser.add_argument('--tokens', type=int, default=200)
    parser.add_argument('--temperature', type=float, default=0.7)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--tokenizer', type=Path, metavar='FILE')
    flags = parser.parse_args(arguments)
    try:
        path = newest(flags.checkpoint)
        stored = checkpointing.Stored(path)
        weights = stored.unread().get('variables', {}).get('params')
        architecture = ARCHITECTURES[hugging_face.identify(weights)]
        stored.check(name for name in stored.described() if name.startswith('variables/'))
        params = jax.tree.map(np.asarray, weights)
        config: dict[str, Any] = stored.record.get('config') or {}
        length = config.get('sequence_length', architecture.original_length)
        tokenizer: Tokenizer = File(flags.tokenizer) if flags.tokenizer else Bytes()
        tokens = tokenizer.encode(flags.text)
        if not tokens or max(tokens) >= architecture.vocabulary or flags.tokens < 1:
            raise ValueError(
                f'the text must have a token, all below {architecture.vocabulary}, and --tokens '
                'be above 0'
            )
        length = min(length, len(tokens) + flags.tokens)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return REJECTED
    new = continuation(
        params,
        architecture,
        tokens,
        count=flags.tokens,
        length=length,
        temperature=flags.temperature,
        seed=flags.seed,
    )
    print(flags.text + tokenizer.decode(new))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
