# SPDX-License-Identifier: Apache-2.0
"""Tokenised data sets: where their files are, and what is known of them."""

import dataclasses
import hashlib
from pathlib import Path

from settings.errors import DatasetError
from workloads.llama31_8b.datasets import CHECKSUMS, FILES
from workloads.llama31_8b.fields import LlamaConfig
from workloads.llama31_8b.token_files import TokenFile


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A data set as a run sees it, by its metadata alone.

    Attributes:
      name: as in the configuration.
      train, validation: the paths of its files, without .bin and .idx.
      num_train: sequences that an epoch of its documents fills.
      num_eval: sequences that are evaluated.
      digest: of its files' checksums; None where these were not recorded.
    """

    name: str
    train: Path
    validation: Path
    num_train: int
    num_eval: int
    digest: str | None


def find_corpus(config: LlamaConfig) -> Corpus:
    """The data set of a configuration.

    Raises:
      DatasetError: a file is missing or damaged, or has too few tokens.
    """
    folder = Path(config.data_dir).expanduser().absolute() / config.dataset
    names = FILES[config.dataset]
    if not (folder / f'{names.train}.idx').exists():
        raise DatasetError(
            f'{folder} has no {names.train}.idx; scripts/download_dataset.sh {config.dataset} '
            f'{folder.parent} prepares the data, or name the folder above with --config.data_dir'
        )
    sequences = {}
    for name, least in ((names.train, 1), (names.validation, config.eval_samples)):
        tokens = TokenFile(folder / name).tokens
        sequences[name] = (tokens - 1) // config.sequence_length
        if sequences[name] < least:
            raise DatasetError(
                f'{folder / name}.bin has {tokens} tokens, too few for {least} sequence(s) of '
                f'{config.sequence_length} and one token more'
            )
    recorded = folder / CHECKSUMS
    digest = hashlib.sha256(recorded.read_bytes()).hexdigest()[:32] if recorded.exists() else None
    return Corpus(
        config.dataset,
        folder / names.train,
        folder / names.validation,
        sequences[names.train],
        config.eval_samples,
        digest,
    )
