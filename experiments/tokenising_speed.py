# SPDX-License-Identifier: Apache-2.0
"""The speed and the memory of tokenising a shard of C4's form on one core, measured.

    python experiments/tokenising_speed.py [--copies=4] [--rounds=3]

The speeches, in documents of as many bytes as C4's have on average, are the shard, so many times
over. The tokenizer is trained on them, with Llama 3's pattern of words and at most its number of
tokens. Prints for each round the tokens, the processor's seconds of data_preparation/raw_c4.py's
process, its start included, and the most memory that it had.
"""

import argparse
import gzip
import json
import os
import resource
import sys
import tempfile
import threading
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from data_preparation import raw_c4, token_data
from data_preparation.progress import in_process
from workloads.llama31_8b.token_files import TokenFile

DOCUMENT_BYTES = 2200
# Of the published tokenizer.json of Llama 3.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def train(texts: list[str], path: Path) -> int:
    """Writes a tokenizer.json; its number of tokens."""
    tokenizer = Tokenizer(BPE(ignore_merges=True))
    split = Split(Regex(WORDS), 'isolated')
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = BpeTrainer(
        vocab_size=raw_c4.VOCABULARY, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    size: int = tokenizer.get_vocab_size()
    return size


def main() -> int:
    """Prints the table; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--copies', type=int, default=4)
    parser.add_argument('--rounds', type=int, default=3)
    flags = parser.parse_args()
    content = b'\n'.join(token_data.messages().values()).decode()
    starts = range(0, len(content), DOCUMENT_BYTES)
    texts = [content[start : start + DOCUMENT_BYTES] for start in starts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, shard = folder / 'tokenizer.json', folder / 'shard.json.gz'
        size = train(texts, tokenizer)
        with gzip.open(shard, 'wt') as file:
            file.writelines(json.dumps({'text': text}) + '\n' for text in texts * flags.copies)
        print(f'{len(texts) * flags.copies:,} documents, a tokenizer of {size:,} tokens\n')
        print('| tokens | seconds | tokens/s | memory |\n|---|---|---|---|')
        part = raw_c4.Part.of(folder, [shard], None)
        before = 0.0
        for _ in range(flags.rounds):
            in_process(raw_c4.write_part, (part, tokenizer, None), threading.Event())
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds, before = used.ru_utime + used.ru_stime - before, used.ru_utime + used.ru_stime
            count = TokenFile(part.prefix).tokens
            memory = f'{used.ru_maxrss / 1e6:.2f} GB'
            print(f'| {count:,} | {seconds:.1f} | {count / seconds:,.0f} | {memory} |', flush=True)
    return 0


if __name__ == '__main__':
    os.environ['TOKENIZERS_PARALLELISM'] = 'true'  # Of the training.
    sys.exit(main())
