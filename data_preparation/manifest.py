# SPDX-License-Identifier: Apache-2.0
"""What a dataset holds, in a form that does not depend on how it is cut into shards or ordered.

A record's digest is the SHA-256 of its identifier, label and encoded image. The digest of a set of
records is the sum of theirs modulo 2^256, so a shard's digests add up to the split's, in any order,
and a record that is missing or there twice changes it.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tensorflow_datasets.proto import tf_example_pb2

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
    path.write_text(json.dumps(content) + '\n')
    return path


def published(name: str, version: str, encoding: str) -> Path:
    """Where the repository would keep the manifest of a dataset whose content is known."""
    return PUBLISHED / f'{name}-{version}-{encoding}.json'
