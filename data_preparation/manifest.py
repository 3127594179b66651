# SPDX-License-Identifier: Apache-2.0
"""What a dataset holds, in a form that does not depend on how it is cut into shards or ordered.

A record's digest is the SHA-256 of its identifier, label and encoded image. The digest of a set of
records is the sum of theirs modulo 2^256, so a shard's digests add up to the split's, in any order,
and a record that is missing or there twice changes it.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorflow_datasets.proto import tf_example_pb2

from data_preparation import files

FILE_NAME = 'manifest.json'
PUBLISHED = Path(__file__).parent / 'manifests'
# The features that may identify a record, by dataset: CIFAR-10 and digits have `id`, ImageNet
# `file_name`.
IDENTIFIERS = ('id', 'file_name')


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as stored: its identifier (empty where it has none), label and encoded image."""

    name: bytes
    label: int
    image: bytes

    @classmethod
    def parse(cls, serialized: bytes) -> 'Record':
        """Reads a serialized `tf.train.Example`.

        Raises:
            ValueError: it is none, or has no image or no label.
        """
        try:
            features = tf_example_pb2.Example.FromString(serialized).features.feature
            names = [features[i].bytes_list.value[0] for i in IDENTIFIERS if i in features]
            label = features['label'].int64_list.value[0]
            return cls(b''.join(names), label, features['image'].bytes_list.value[0])
        except Exception as error:  # protobuf's own class of error is not public
            raise ValueError(f'no tf.train.Example with an image and a label: {error}') from error

    @property
    def digest(self) -> int:
        """SHA-256 of what the record holds, as an integer."""
        head = b'%s\0%d\0' % (self.name, self.label)
        return int.from_bytes(hashlib.sha256(head + self.image).digest(), 'big')


@dataclasses.dataclass
class Summary:
    """Count, digest and examples per class of a set of records; two of them add up."""

    examples: int = 0
    digest: int = 0
    class_counts: Counter = dataclasses.field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Takes one more record in."""
        self.examples += 1
        self.digest = (self.digest + record.digest) % 2**256
        self.class_counts[record.label] += 1

    def __add__(self, other: 'Summary') -> 'Summary':
        return Summary(
            self.examples + other.examples,
            (self.digest + other.digest) % 2**256,
            self.class_counts + other.class_counts,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` is the way back."""
        counts = [self.class_counts[c] for c in range(max(self.class_counts, default=-1) + 1)]
        return {
            'examples': self.examples,
            'digest': f'{self.digest:064x}',
            'class_counts': counts,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> 'Summary':
        """The summary that `to_json` wrote."""
        counts = Counter({c: n for c, n in enumerate(values['class_counts']) if n})
        return cls(values['examples'], int(values['digest'], 16), counts)


@dataclasses.dataclass(frozen=True)
class Split:
    """What a manifest says of a split; None or empty where that is not known.

    `shards` has the digest of each shard by its file's name.
    """

    examples: int
    class_counts: list[int] | None = None
    digest: str | None = None
    shards: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The names of the classes in the order of their labels, and the splits by name."""

    label_names: list[str]
    splits: dict[str, Split]


def read(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the text names the file and what is wrong in it.
    """
    content = files.read_json(path)
    try:
        labels = content.pop('label_names')
        splits = {name: Split(**values) for name, values in content.items()}
        wrong = [] if _is_list_of(str, labels) else ['label_names is not a list of names']
        for name, split in splits.items():
            wrong += [f'{name}: {reason}' for reason in _contradictions(split)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is damaged or not a manifest: {error!r}') from error
    if wrong:
        raise ValueError(f'{path} is damaged: {"; ".join(wrong)}')
    return Manifest(labels, splits)


def _contradictions(split: Split) -> list[str]:
    """What cannot be true of a split; empty for what `write` writes."""
    wrong = []
    if type(split.examples) is not int or split.examples < 0:
        wrong.append(f'examples is {split.examples!r}, not a count')
    if split.class_counts is not None and (
        not _is_list_of(int, split.class_counts) or sum(split.class_counts) != split.examples
    ):
        wrong.append('class_counts are not counts that add up to examples')
    digests = [*split.shards.values(), *([] if split.digest is None else [split.digest])]
    if not all(re.fullmatch('[0-9a-f]{64}', digest) for digest in digests):
        wrong.append('a digest is not 64 hexadecimal digits')
    elif split.shards and _total(split.shards.values()) != split.digest:
        wrong.append("the shards' digests do not add up to the split's")
    return wrong


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _total(digests: Iterable[str]) -> str:
    return f'{sum(int(digest, 16) for digest in digests) % 2**256:064x}'


def write(directory: Path, splits: dict[str, dict[str, Summary]], label_names: list[str]) -> Path:
    """Writes a dataset's manifest into its folder and returns the file.

    Args:
        directory: the dataset's folder, …/NAME/VERSION.
        splits: for each split its shards' file names and summaries.
        label_names: the names of the classes in the order of their labels.
    """
    content: dict[str, Any] = {'label_names': label_names}
    for split, shards in splits.items():
        whole = sum(shards.values(), Summary())
        content[split] = whole.to_json() | {
            'shards': {name: f'{shard.digest:064x}' for name, shard in sorted(shards.items())}
        }
    path = directory / FILE_NAME
    temporary = path.with_suffix('.part')
    temporary.write_text(json.dumps(content) + '\n')
    os.replace(temporary, path)
    return path


def published(name: str, version: str, encoding: str) -> Path:
    """Where the repository would keep the manifest of a dataset whose content is known."""
    return PUBLISHED / f'{name}-{version}-{encoding}.json'
