# SPDX-License-Identifier: Apache-2.0
"""What a dataset holds, in a form that does not depend on how it is cut into shards or ordered.

A record's digest is the SHA-256 of its identifier, label and encoded image. The digest of a set of
records is the sum of theirs modulo 2^256, so shards' digests add up to the split's, in any order,
and a record that is missing or there twice changes it.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_preparation import files
from workloads.resnet.records import Record

FILE_NAME = 'manifest.json'
PUBLISHED = Path(__file__).parent / 'manifests'


def digest_of(record: Record) -> int:
    """SHA-256 of what a record holds, as an integer."""
    head = b'%s\0%d\0' % (record.name, record.label)
    return int.from_bytes(hashlib.sha256(head + record.image).digest(), 'big')


def _total(digests: Iterable[int]) -> str:
    return f'{sum(digests) % 2**256:064x}'


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of the records of a shard or a split; None or empty where it is not.

    `class_counts` has the number of examples by label, `shards` the digest of each shard of a split
    by its file's name.
    """

    examples: int
    class_counts: list[int] | None = None
    digest: str | None = None
    shards: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_records(cls, facts: list[tuple[int, int]]) -> 'Summary':
        """Of a shard's records, each given as (label, digest)."""
        counts = np.bincount(np.array([label for label, _ in facts], np.int64)).tolist()
        return cls(len(facts), counts, _total(digest for _, digest in facts))

    @classmethod
    def of_shards(cls, shards: Mapping[str, 'Summary']) -> 'Summary':
        """Of a split, from those of all its shards by name."""
        counts = itertools.zip_longest(
            *(s.class_counts or [] for s in shards.values()), fillvalue=0
        )
        digests = {name: shard.digest or '' for name, shard in sorted(shards.items())}
        return cls(
            sum(shard.examples for shard in shards.values()),
            [sum(of_class) for of_class in counts],
            _total(int(digest, 16) for digest in digests.values()),
            digests,
        )

    @classmethod
    def from_json(cls, values: Any) -> 'Summary':
        """The inverse of `dataclasses.asdict`; ValueError says what cannot be true."""
        try:
            summary = cls(**values)
            digests = [*summary.shards.values(), summary.digest or 64 * '0']
        except (AttributeError, TypeError) as error:
            raise ValueError(f'it has unknown or unusable fields ({error})') from error
        examples, counts = summary.examples, summary.class_counts
        if type(examples) is not int or examples < 0:
            raise ValueError(f'examples is {examples!r}, not a count')
        if counts is not None and (not _is_list_of(int, counts) or sum(counts) != examples):
            raise ValueError('class_counts are not counts that add up to examples')
        if not all(isinstance(d, str) and re.fullmatch('[0-9a-f]{64}', d) for d in digests):
            raise ValueError('a digest is not 64 hexadecimal digits')
        total = _total(int(digest, 16) for digest in summary.shards.values())
        if summary.shards and total != summary.digest:
            raise ValueError("the shards' digests do not add up to the split's")
        return summary


class Manifest(NamedTuple):
    """The names of the classes in the order of their labels, and what each split holds."""

    label_names: list[str]
    splits: dict[str, Summary]


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def read(path: Path) -> Manifest:
    """Reads a manifest; what is not published may be left out.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the text names the file and what is wrong in it.
    """
    splits = files.read_json(path)
    labels = splits.pop('label_names', None)
    if not _is_list_of(str, labels):
        raise ValueError(f'{path} is damaged: label_names is not a list of names')
    try:
        return Manifest(labels, {name: Summary.from_json(of) for name, of in splits.items()})
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}') from error


def write(directory: Path, manifest: Manifest) -> None:
    """Writes a dataset's manifest into its folder, …/NAME/VERSION."""
    splits = {name: dataclasses.asdict(split) for name, split in manifest.splits.items()}
    files.write_json(directory / FILE_NAME, {'label_names': manifest.label_names, **splits})
