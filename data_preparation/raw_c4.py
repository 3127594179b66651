# SPDX-License-Identifier: Apache-2.0
"""C4's own shards and a tokenizer in, the four files that MLCommons publishes out.

As the official preparation does it (mlcommons/training, small_llm_pretraining/nemo/utils, and the
script of NeMo that it calls): the shards in their order, a JSON object a line, the tokens of its
`text` a document, without any before or after them; of the validation shards, the first
`VALIDATION_LINES` lines. A text without tokens is left out. Every shard becomes a pair of files of
its own, by a process of its own, under `DATA_DIR/incomplete.c4`; when all are there, they are
joined, and the folder gets its name. A preparation that was stopped resumes with the shards that
are missing.
"""

import functools
import gzip
import hashlib
import itertools
import json
import os
import shlex
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_preparation import files
from data_preparation.progress import in_process, in_threads, only_one, progress
from data_preparation.token_data import record_checksums
from models.llama.architectures import ARCHITECTURES
from settings.errors import DatasetError
from workloads.llama31_8b import token_files
from workloads.llama31_8b.datasets import CHECKSUMS, FILES

# The file that the official code trains on, the seventh of eight.
TRAIN = tuple(f'c4-train.{number:05}-of-01024' for number in range(768, 896))
VALIDATION = tuple(f'c4-validation.{number:05}-of-00008' for number in range(8))
VALIDATION_LINES = 91_205
VOCABULARY = ARCHITECTURES['llama31_8b'].vocabulary
SUFFIXES = ('.json.gz', '.json')
SOURCE = 'source.json'  # What the files were made from, beside them.
MOST_LINE_BYTES = 1 << 26
BATCH = 64  # lines that are tokenised at a time


class Part(NamedTuple):
    """Shards that become a pair of files.

    Attributes:
      prefix: of the files.
      shards: read one after the other.
      lines: so many are read in all; None: all.
      size: of the shards, in bytes; the prefix has it, so that no part of a shard that has been
        fetched anew is kept.
    """

    prefix: Path
    shards: Sequence[Path]
    lines: int | None
    size: int

    @classmethod
    def of(cls, folder: Path, shards: Sequence[Path], lines: int | None) -> 'Part':
        """The part of shards in a folder."""
        size = sum(path.stat().st_size for path in shards)
        return cls(folder / f'part.{shards[0].name}.{size}', shards, lines, size)

    def is_complete(self) -> bool:
        """Whether its files are there."""
        return Path(f'{self.prefix}.idx').exists()


def prepare(
    data_dir: Path, raw: Path, tokenizer: Path, append_eod: str | None, workers: int
) -> Path:
    """Writes `data_dir/c4` and returns it; returns at once when it is there.

    Args:
      data_dir: the root of all data.
      raw: the folder of the shards, compressed or not.
      tokenizer: a tokenizer.json.
      append_eod: a token that ends every document; None: none, as in the official preparation.
      workers: processes.

    Raises:
      DatasetError: a shard is missing or damaged, or the tokenizer is another one; the text names
        file and line.
      OSError: the disk is full, a folder cannot be read or written to, or another preparation is at
        work on it.
    """
    final, work = data_dir / 'c4', data_dir / 'incomplete.c4'
    if (final / CHECKSUMS).exists():
        return final
    if final.exists() and any(final.iterdir()):
        raise DatasetError(f'{final} is there, and has no {CHECKSUMS}; move it away')
    train, validation = (_find(raw, shards) for shards in (TRAIN, VALIDATION))
    end = _end_of_document(tokenizer, append_eod)
    work.mkdir(parents=True, exist_ok=True)
    with only_one(work):
        _check_source(work, tokenizer, append_eod)
        if not (work / CHECKSUMS).exists():
            parts = [Part.of(work, [path], None) for path in train]
            held_out = Part.of(work, validation, VALIDATION_LINES)
            _write_parts([held_out, *parts], tokenizer, end, workers)
            names = FILES['c4']
            token_files.join(work / names.train, [part.prefix for part in parts])
            token_files.join(work / names.validation, [held_out.prefix])
            record_checksums(work, names)
        for path in work.glob('part.*'):
            path.unlink()
        os.rename(work, final)
    return final


def _find(raw: Path, shards: Sequence[str]) -> list[Path]:
    """The files of shards; all that are missing are named."""
    found, missing = [], []
    for shard in shards:
        paths = [raw / f'{shard}{suffix}' for suffix in SUFFIXES]
        there = next(filter(Path.exists, paths), None)
        if there:
            files.check_regular(there)
            found.append(there)
        else:
            missing.append(paths[0].name)
    if missing:
        some = ', '.join(missing[:6]) + f', … ({len(missing)} in all)' * (len(missing) > 6)
        raise DatasetError(
            f'{raw} lacks {some} of the {len(shards)} shards {shards[0]} to {shards[-1]}, each '
            f'{" or ".join(SUFFIXES)}'
        )
    return found


@functools.cache
def _read_tokenizer(path: Path) -> Any:
    """The tokenizer of a tokenizer.json, which neither cuts nor fills up what it reads."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DatasetError(
            'the package tokenizers is missing; scripts/setup_env.sh installs it'
        ) from error
    files.check_regular(path, files.MAX_JSON_BYTES)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # It raises no narrower type.
        raise DatasetError(f'{path} is no tokenizer.json, or damaged: {error}') from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _end_of_document(path: Path, append_eod: str | None) -> int | None:
    """The number of the token to append; DatasetError if the tokenizer is another network's."""
    tokenizer = _read_tokenizer(path)
    if tokenizer.get_vocab_size() != VOCABULARY:
        size = tokenizer.get_vocab_size()
        raise DatasetError(f'{path} has {size:,} tokens, and that of Llama 3.1 {VOCABULARY:,}')
    if append_eod is None:
        return None
    end: int | None = tokenizer.token_to_id(append_eod)
    if end is None:
        raise DatasetError(f'--append_eod={append_eod}: {path} has no such token')
    return end


def _check_source(work: Path, tokenizer: Path, append_eod: str | None) -> None:
    """Notes what the tokens are; DatasetError if those that are there are others."""
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    source = {'tokenizer_sha256': digest, 'append_eod': append_eod}
    if not (work / SOURCE).exists():
        files.write_json(work / SOURCE, source)
    elif files.read_json(work / SOURCE) != source:
        raise DatasetError(
            f'{work} was begun with another tokenizer or --append_eod, see its {SOURCE}; give '
            f'those, or begin anew: rm -r {shlex.quote(str(work))}'
        )


def _write_parts(parts: Sequence[Part], tokenizer: Path, end: int | None, workers: int) -> None:
    """Writes the parts that are missing, `workers` at a time."""

    def write(part: Part, stop: threading.Event) -> None:
        if in_process(write_part, (part, tokenizer, end), stop):
            bar.update(part.size)

    missing = [part for part in parts if not part.is_complete()]
    total = sum(part.size for part in parts)
    done = total - sum(part.size for part in missing)
    with progress('tokenising', total, 'B', done) as bar:
        in_threads(write, [(part,) for part in missing], workers)


def write_part(part: Part, tokenizer: Path, end: int | None) -> None:
    """Writes a part's pair of files, on one core. Raises as `prepare`."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # Processes share the cores.
    token_files.write(part.prefix, documents(part, tokenizer, end), VOCABULARY)


def documents(part: Part, tokenizer: Path, end: int | None) -> Iterator[np.ndarray]:
    """The tokens of every text, int32, in the order of shards and lines."""
    read = _read_tokenizer(tokenizer)
    all_texts = itertools.chain.from_iterable(map(texts, part.shards))
    limited, count = itertools.islice(all_texts, part.lines), 0
    while batch := list(itertools.islice(limited, BATCH)):
        count += len(batch)
        for encoding in read.encode_batch_fast(batch, add_special_tokens=False):
            if ids := encoding.ids:
                yield np.array(ids if end is None else [*ids, end], np.int32)
    if part.lines not in (None, count):
        first, last = part.shards[0].name, part.shards[-1].name
        raise DatasetError(f'{first} to {last} have {count:,} lines; {part.lines:,} are read')


def texts(path: Path) -> Iterator[str]:
    """The text of every line of a shard.

    Raises:
      DatasetError: the shard is damaged or empty, or a line is no JSON object with a text.
    """
    number = 0
    for number, line in enumerate(_lines(path), start=1):
        try:
            text = json.loads(line)['text']
            text.encode()  # Half a surrogate pair cannot be.
        except KeyError:
            raise DatasetError(f'{path}, line {number}: it has no "text"') from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            what = f'it is no JSON object with a "text": {error}'
            raise DatasetError(f'{path}, line {number}: {what}') from error
        yield text
    if not number:
        raise DatasetError(f'{path} is empty; fetch it again')


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be compressed by gzip."""
    number = 0
    with path.open('rb') as file:
        is_compressed = file.read(2) == b'\x1f\x8b'
    with gzip.open(path) if is_compressed else path.open('rb') as stream:
        try:
            while line := stream.readline(MOST_LINE_BYTES + 1):
                number += 1
                if len(line) > MOST_LINE_BYTES:
                    most = f'{MOST_LINE_BYTES:,} bytes; at most so many are read'
                    raise DatasetError(f'{path}, line {number}: it has more than {most}')
                yield line
        except (OSError, EOFError, zlib.error) as error:
            raise DatasetError(
                f'{path} is damaged after line {number}: {error}; fetch it again'
            ) from error
