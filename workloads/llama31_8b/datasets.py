# SPDX-License-Identifier: Apache-2.0
"""The data sets by name. Imports nothing heavy, so that rules and command lines can read it."""

from typing import NamedTuple

# Sizes and SHA-256 of the files, beside them; written when they are prepared.
CHECKSUMS = 'checksums.json'


class Names(NamedTuple):
    """The files of a data set in its folder, without .bin and .idx."""

    train: str
    validation: str


FILES = {
    # As the MLCommons bucket has them: shards 768 to 895 of C4's 1024 for training, and a part of
    # its validation shards, by the tokenizer of Llama 3.1.
    'c4': Names('c4-train.en_6_text_document', 'c4-validation-91205-samples.en_text_document'),
    'speeches': Names('train', 'validation'),
}
