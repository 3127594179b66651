# SPDX-License-Identifier: Apache-2.0
"""C4's texts become the files that Megatron writes, or an error names the line."""

import contextlib
import gzip
import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_preparation import __main__, progress, raw_c4, token_data
from settings.errors import DatasetError
from workloads.llama31_8b.datasets import CHECKSUMS, FILES

tokenizers = pytest.importorskip('tokenizers')

GOLDEN = Path(__file__).parents[1] / 'golden' / 'llama31_8b' / 'data'
NAMES = FILES['c4']
LINES = 30  # Of validation shards, in these tests.


def shard(path, texts):
    """Writes a shard as C4 has them: of a text or, as it is, of bytes."""
    lines = [
        t if isinstance(t, bytes) else json.dumps({'text': t, 'url': 'x'}).encode() for t in texts
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(b''.join(line + b'\n' for line in lines), 1))


def words(size):
    """A tokenizer of `size` words: of `w7` the number is 7."""
    model = tokenizers.models.WordLevel({f'w{i}': i for i in range(size)}, 'w0')
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def said(tokens):
    """The text of tokens of `words`."""
    return ' '.join(f'w{i}' for i in tokens)


def read_independently(prefix):
    """The documents of a pair of files, by the description of the format alone."""
    content = Path(f'{prefix}.idx').read_bytes()
    magic, version, code, count, bounds = struct.unpack_from('<9sQBQQ', content)
    assert (magic, version, code, bounds) == (b'MMIDIDX\0\0', 1, 4, count + 1)
    lengths = struct.unpack_from(f'<{count}i', content, 34)
    starts = struct.unpack_from(f'<{count}q', content, 34 + 4 * count)
    assert struct.unpack_from(f'<{bounds}q', content, 34 + 12 * count) == tuple(range(bounds))
    assert len(content) == 34 + 20 * count + 8
    tokens = Path(f'{prefix}.bin').read_bytes()
    assert starts == tuple(4 * sum(lengths[:i]) for i in range(count))
    assert len(tokens) == 4 * sum(lengths)
    return [
        list(struct.unpack_from(f'<{n}i', tokens, start))
        for n, start in zip(lengths, starts, strict=True)
    ]


@pytest.fixture
def small(monkeypatch):
    """Three shards of each kind, tokenised without processes, which take a second to start."""
    monkeypatch.setattr(raw_c4, 'in_process', lambda f, arguments, stop: f(*arguments) is None)
    monkeypatch.setattr(
        raw_c4, 'TRAIN', tuple(f'c4-train.{i:05}-of-01024' for i in range(768, 771))
    )
    monkeypatch.setattr(raw_c4, 'VALIDATION', raw_c4.VALIDATION[:3])
    monkeypatch.setattr(raw_c4, 'VALIDATION_LINES', LINES)


@pytest.fixture(scope='module')
def text():
    """The speeches in paragraphs, each of which is a document here."""
    return [p for speech in token_data.messages().values() for p in speech.decode().split('\n\n')]


@pytest.fixture(scope='module')
def bpe(tmp_path_factory, text):
    """The path of a tokenizer of byte pairs, as Llama's is one, with as many tokens.

    Most of them no text has. As it is, it adds a token at the beginning, cuts, and fills up.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=['<|begin|>', '<|end|>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(text[:200], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|begin|> $A', special_tokens=[('<|begin|>', 0)]
    )
    tokenizer.enable_truncation(20)
    tokenizer.enable_padding()
    described = json.loads(tokenizer.to_str())
    described['model']['vocab'] |= {f'unused {i}': i for i in range(500, 128_256)}
    path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
    path.write_text(json.dumps(described))
    return path


@pytest.fixture
def raw(tmp_path, small, text):
    """A folder of small shards."""
    for i, name in enumerate((*raw_c4.TRAIN, *raw_c4.VALIDATION)):
        shard(
            tmp_path / 'raw' / f'{name}.json.gz', [*text[40 * i : 40 * i + 15], '', 'ß 語 <|end|>']
        )
    return tmp_path / 'raw'


def texts_of(raw, names):
    """What the shards say, read independently."""
    for name in names:
        for line in gzip.decompress((raw / f'{name}.json.gz').read_bytes()).splitlines():
            yield json.loads(line)['text']


@pytest.mark.parametrize('append', [None, '<|end|>'])
def test_documents_are_the_texts_in_order(tmp_path, raw, bpe, append):
    folder = raw_c4.prepare(tmp_path / 'data', raw, bpe, append, workers=2)
    reference = tokenizers.Tokenizer.from_file(str(bpe))
    reference.no_truncation()
    reference.no_padding()
    for name, shards, count in (
        (NAMES.train, raw_c4.TRAIN, None),
        (NAMES.validation, raw_c4.VALIDATION, LINES),
    ):
        found = read_independently(folder / name)
        expected = [text for text in list(texts_of(raw, shards))[:count] if text]
        assert len(found) == len(expected)
        for tokens, text in zip(found, expected, strict=True):
            ids = reference.encode(text, add_special_tokens=False).ids
            assert tokens == ids + [1] * bool(append)
            assert reference.decode(ids, skip_special_tokens=False) == text


def test_the_files_are_megatrons(tmp_path, small, monkeypatch):
    """Its own files of tokens, as words, become them again: byte by byte, by three shards."""
    words(128_256).save(str(tmp_path / 'tokenizer.json'))
    for name, names in (('tiny_a', raw_c4.TRAIN), ('tiny_val', raw_c4.VALIDATION)):
        documents = read_independently(GOLDEN / name)
        monkeypatch.setattr(raw_c4, 'VALIDATION_LINES', len(documents))
        for i, some in enumerate(np.array_split(np.arange(len(documents)), 3)):
            shard(tmp_path / 'raw' / f'{names[i]}.json.gz', [said(documents[j]) for j in some])
    arguments = (tmp_path, tmp_path / 'raw', tmp_path / 'tokenizer.json', None)
    folder = raw_c4.prepare(*arguments, workers=2)
    for ours, theirs in ((NAMES.train, 'tiny_a'), (NAMES.validation, 'tiny_val')):
        for suffix in ('bin', 'idx'):
            content = (folder / f'{ours}.{suffix}').read_bytes()
            assert content == (GOLDEN / f'{theirs}.{suffix}').read_bytes()


def test_megatrons_files_with_ends_of_documents(tmp_path):
    """A document that is nothing but its end has no tokens in its text, and is left out."""
    documents = read_independently(GOLDEN / 'tiny_eod')
    words(128_256).save(str(tmp_path / 'tokenizer.json'))
    shard(tmp_path / 'x.json.gz', [said(document[:-1]) for document in documents])
    part = raw_c4.Part(tmp_path / 'some', [tmp_path / 'x.json.gz'], None, 0)
    raw_c4.write_part(part, tmp_path / 'tokenizer.json', 1)
    assert read_independently(tmp_path / 'some') == [d for d in documents if len(d) > 1]


def test_the_result_is_verified_and_not_made_again(tmp_path, raw, bpe):
    folder = raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)
    wanted = {f'{name}.{suffix}' for name in NAMES for suffix in ('bin', 'idx')}
    assert {path.name for path in folder.iterdir()} == wanted | {CHECKSUMS, raw_c4.SOURCE}
    assert not (tmp_path / 'data' / 'incomplete.c4').exists()
    assert '4 files' in token_data.verify('c4', tmp_path / 'data')
    assert raw_c4.prepare(tmp_path / 'data', tmp_path / 'gone', bpe, None, workers=1) == folder
    content = bytearray((folder / f'{NAMES.train}.bin').read_bytes())
    content[100] ^= 1
    (folder / f'{NAMES.train}.bin').write_bytes(content)
    with pytest.raises(DatasetError, match='train.en_6_text_document.bin is damaged'):
        token_data.verify('c4', tmp_path / 'data')


def test_shards_need_not_be_compressed_and_processes_change_nothing(
    tmp_path, raw, bpe, monkeypatch
):
    first = raw_c4.prepare(tmp_path / 'one', raw, bpe, None, workers=1)
    monkeypatch.setattr(raw_c4, 'in_process', progress.in_process)
    for path in raw.iterdir():
        path.with_suffix('').write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    second = raw_c4.prepare(tmp_path / 'two', raw, bpe, None, workers=3)
    assert (first / CHECKSUMS).read_text() == (second / CHECKSUMS).read_text()


GOOD = b'{"text": "good"}'


@pytest.mark.parametrize(
    ('lines', 'said'),
    [
        ([GOOD, b'{"text": "cut'], 'line 2: it is no JSON object with a "text"'),
        ([GOOD, b'{"words": "x"}'], 'line 2: it has no "text"'),
        ([GOOD, GOOD, b'{"text": 3}'], 'line 3: it is no JSON object with a "text"'),
        ([GOOD, b'[1]'], 'line 2: it is no JSON object'),
        ([GOOD, b''], 'line 2: it is no JSON object'),
        ([b'{"text": "\xff"}'], 'line 1: it is no JSON object'),
        ([b'{"text": "\\ud800"}'], 'line 1: it is no JSON object'),
        ([b'[' * 100_000], 'line 1: it is no JSON object'),
        ([], 'is empty; fetch it again'),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, lines, said):
    shard(tmp_path / 'x.json.gz', lines)
    with pytest.raises(DatasetError, match=f'x.json.gz.*{said}'):
        list(raw_c4.texts(tmp_path / 'x.json.gz'))


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_c4, 'MOST_LINE_BYTES', 1000)
    shard(tmp_path / 'x.json.gz', [GOOD, b'{' * 2000])
    with pytest.raises(DatasetError, match='line 2: it has more than 1,000 bytes'):
        list(raw_c4.texts(tmp_path / 'x.json.gz'))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), r'\.gz is damaged after line \d+'),
        (flip_a_bit, r'\.gz(, line \d+: it is no JSON| is damaged after line \d+)'),
        (lambda path: path.write_bytes(b''), r'\.gz is empty'),
        (lambda path: path.unlink(), r'raw lacks c4-train.00769-of-01024.json.gz of the 3 shards'),
        (lambda path: (path.unlink(), path.mkdir()), 'is not a regular file'),
    ],
)
def test_a_shard_that_is_damaged_is_named_and_mended_without_the_others(
    tmp_path, raw, bpe, damage, said, monkeypatch
):
    path = raw / 'c4-train.00769-of-01024.json.gz'
    whole = path.read_bytes()
    damage(path)
    with pytest.raises((DatasetError, ValueError), match=said):
        raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)
    assert not (tmp_path / 'data' / 'c4').exists()
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    was_begun, written = (tmp_path / 'data').exists(), []
    monkeypatch.setattr(raw_c4, 'write_part', noting(written, raw_c4.write_part))
    raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)
    assert path in [part.shards[0] for part in written]
    # Before it, two of four parts were written; the last, perhaps.
    assert len(written) in ((1, 2) if was_begun else (4,))


def noting(calls, function):
    """A function that notes its first argument."""

    def call(part, *arguments):
        calls.append(part)
        return function(part, *arguments)

    return call


def children(pid):
    """The processes that a process has started."""
    found = []
    for status in Path('/proc').glob('[0-9]*/status'):
        with contextlib.suppress(OSError):  # It has just ended.
            if f'PPid:\t{pid}\n' in status.read_text():
                found.append(status.parent)
    return found


def test_too_few_lines_are_an_error(tmp_path, raw, bpe, monkeypatch):
    monkeypatch.setattr(raw_c4, 'VALIDATION_LINES', 1000)
    with pytest.raises(DatasetError, match='have 51 lines; 1,000 are read'):
        raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)


def test_another_tokenizer_is_an_error(tmp_path, raw, bpe):
    def said(tokenizer, append=None):
        with pytest.raises((DatasetError, FileNotFoundError)) as caught:
            raw_c4.prepare(tmp_path / 'data', raw, tokenizer, append, workers=1)
        return str(caught.value)

    assert 'tokenizer.json has no such token' in said(bpe, '</s>')
    assert 'none.json is missing' in said(tmp_path / 'none.json')
    (tmp_path / 'bad.json').write_text('{}')
    assert 'bad.json is no tokenizer.json, or damaged' in said(tmp_path / 'bad.json')
    words(500).save(str(tmp_path / 'small.json'))
    assert 'small.json has 500 tokens, and that of Llama 3.1 128,256' in said(
        tmp_path / 'small.json'
    )
    assert not (tmp_path / 'data').exists()


def test_what_was_begun_otherwise_is_not_continued(tmp_path, raw, bpe):
    (raw / 'c4-train.00770-of-01024.json.gz').write_bytes(gzip.compress(b'{'))
    with pytest.raises(DatasetError, match='line 1'):
        raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)
    with pytest.raises(DatasetError, match=r'begun with another .*begin anew: rm -r .*incomplete'):
        raw_c4.prepare(tmp_path / 'data', raw, bpe, '<|end|>', workers=1)


def test_a_shard_that_has_been_fetched_anew_is_tokenised_anew(tmp_path, raw, bpe, text):
    last = raw / 'c4-train.00770-of-01024.json.gz'
    shard(last, [b'{'])
    with pytest.raises(DatasetError, match='line 1'):
        raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)
    shard(last, text[:3])
    shard(raw / 'c4-train.00768-of-01024.json.gz', text[:5])
    folder = raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)
    assert len(read_independently(folder / NAMES.train)) == 5 + 16 + 3


def test_files_that_are_there_are_not_touched(tmp_path, raw, bpe):
    folder = tmp_path / 'data' / 'c4'
    folder.mkdir(parents=True)
    (folder / f'{NAMES.train}.bin').write_bytes(b'x')
    with pytest.raises(DatasetError, match='is there, and has no checksums.json; move it away'):
        raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)


KILLED = """
import sys
from pathlib import Path
from data_preparation import raw_c4
if __name__ == '__main__':
    raw_c4.TRAIN, raw_c4.VALIDATION = raw_c4.TRAIN[:3], raw_c4.VALIDATION[:3]
    raw_c4.VALIDATION_LINES = 30
    raw_c4.prepare(*map(Path, sys.argv[1:]), None, workers=1)
"""


def test_a_killed_preparation_leaves_no_process_and_is_resumed(
    tmp_path, raw, bpe, text, monkeypatch
):
    (tmp_path / 'killed.py').write_text(KILLED)
    shard(raw / 'c4-train.00769-of-01024.json.gz', text)  # Takes long.
    arguments = [tmp_path / 'data', raw, bpe]
    work = tmp_path / 'data' / 'incomplete.c4'
    process = subprocess.Popen([sys.executable, tmp_path / 'killed.py', *arguments])
    while not list(work.glob('part.c4-train.00769*.bin.incomplete')):
        assert process.poll() is None
        time.sleep(0.01)
    workers = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(path.exists() for path in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert workers
    assert not (tmp_path / 'data' / 'c4').exists()
    assert not list(work.glob('part.c4-train.00769*.idx'))  # Nor had the worker come to its end.

    shard(raw / 'c4-train.00769-of-01024.json.gz', text[:10])
    written = []
    monkeypatch.setattr(raw_c4, 'write_part', noting(written, raw_c4.write_part))
    folder = raw_c4.prepare(*arguments, None, workers=1)
    assert [part.shards[0].name[9:14] for part in written] == ['00769', '00770']
    monkeypatch.undo()
    assert len(read_independently(folder / NAMES.train)) == 16 + 10 + 16


def test_what_was_joined_is_not_made_again(tmp_path, raw, bpe, monkeypatch):
    """Stopped when the shards' files were being removed."""

    def refuse(path):
        raise PermissionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'unlink', refuse)
        with pytest.raises(PermissionError):
            raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)
    work = tmp_path / 'data' / 'incomplete.c4'
    next(work.glob('part.*.idx')).unlink()
    monkeypatch.setattr(raw_c4, 'write_part', None)
    folder = raw_c4.prepare(tmp_path / 'data', raw, bpe, None, workers=1)
    assert '4 files' in token_data.verify('c4', folder.parent)
    assert not list(folder.glob('part.*'))


def test_the_command_line(capsys, monkeypatch):
    def parsed(*arguments):
        monkeypatch.setattr(sys, 'argv', ['data_preparation', 'prepare', 'c4', *arguments])
        return __main__.parse_arguments()

    given = parsed('data', '--raw', 'raw', '--tokenizer=t.json', '--append_eod=<|end|>')
    assert (given.raw.name, given.tokenizer.name, given.append_eod) == ('raw', 't.json', '<|end|>')
    assert parsed('--url=http://x').raw is None
    for wrong in (
        ['--raw=x'],
        ['--tokenizer=x'],
        ['--append_eod=x'],
        ['--raw=x', '--tokenizer=x', '--url=x'],
    ):
        with pytest.raises(SystemExit):
            parsed(*wrong)
        assert re.search('--raw and --tokenizer go together|needs --raw', capsys.readouterr().err)
