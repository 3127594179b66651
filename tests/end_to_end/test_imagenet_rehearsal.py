# SPDX-License-Identifier: Apache-2.0
"""A rehearsal of ImageNet with real JPEGs: fetched, prepared, killed, resumed, verified, trained.

The archives have the official structure and names; only their sizes and checksums are others, which
the option --sources says.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.ilsvrc_archives import CMYK_NAME, PNG_NAME, cmyk_jpeg, png, write_archives
from tests.range_server import RangeServer

pytestmark = pytest.mark.slow

COPIES = 5  # of each JPEG among the training images, so that there is time to interrupt


def command(*arguments) -> list[str]:
    return [sys.executable, '-m', 'data_preparation', *map(str, arguments)]


def finished(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def archives(tmp_path_factory, imagenet_sample) -> Path:
    """A folder with the two archives of 200 real JPEGs, and sources.json."""
    jpegs = {p.name.split('_')[0]: p.read_bytes() for p in sorted(imagenet_sample.iterdir())}
    classes = sorted(jpegs)
    assert len(classes) >= 200
    train = {f'{c}_{i}.JPEG': jpegs[c] for c in classes[:150] for i in range(COPIES)}
    train |= {CMYK_NAME: cmyk_jpeg(), PNG_NAME: png()}
    validation = {
        f'ILSVRC2012_val_{i:08d}.JPEG': jpegs[c] for i, c in enumerate(classes[150:], start=1)
    }
    folder = tmp_path_factory.mktemp('archives')
    write_archives(folder, train, validation, shards=64)
    return folder


@pytest.fixture(scope='module')
def prepared(archives, tmp_path_factory) -> Path:
    """A data_dir with the dataset: downloaded, prepared, killed on the way and resumed."""
    data_dir = tmp_path_factory.mktemp('data')
    files = {path.name: path.read_bytes() for path in archives.glob('*.tar')}
    sources = archives / 'sources.json'
    with RangeServer(files, breaks=[10_000_000, 1, 7_000_000]) as server:
        options = ['prepare', 'imagenet', data_dir, '--sources', sources, '--url', server.url]
        process = subprocess.Popen(command(*options), stderr=subprocess.PIPE, text=True)
        work = data_dir / 'imagenet2012' / 'incomplete.5.1.0'
        deadline = time.monotonic() + 120
        while len(list(work.glob('summaries/*.json'))) < 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        starts = [int(r.removeprefix('bytes=').rstrip('-')) for r, _ in server.requests]
        assert starts == [0, 10_000_000, 10_000_001, 17_000_001, 0]
        killed_with = {p.name: p.stat().st_mtime_ns for p in work.glob('*.array_record-*of-00064')}
        complete = {p.stem for p in work.glob('summaries/*.json')}
        assert 3 <= len(complete) < 64

        verified = finished('verify', 'imagenet2012', data_dir)
        assert 'is not in' in verified.stderr
        resumed = finished(*options)
        assert resumed.returncode == 0, resumed.stderr
        assert len(server.requests) == 5  # nothing was fetched again
    directory = data_dir / 'imagenet2012' / '5.1.0'
    for name in complete:
        assert (directory / name).stat().st_mtime_ns == killed_with[name]
    assert not work.exists()
    return data_dir


def test_the_resumed_preparation_is_that_of_an_undisturbed_one(prepared, archives, tmp_path):
    options = ['--archives_dir', archives, '--sources', archives / 'sources.json']
    undisturbed = finished('prepare', 'imagenet', tmp_path, *options, '--workers', 1)
    assert undisturbed.returncode == 0, undisturbed.stderr
    manifests = [d / 'imagenet2012/5.1.0/manifest.json' for d in (prepared, tmp_path)]
    first, second = (json.loads(path.read_text()) for path in manifests)
    assert first == second
    assert first['train']['examples'] == 150 * COPIES + 2
    verified = finished('verify', 'imagenet2012', prepared, '--full', '--manifest', manifests[1])
    assert verified.returncode == 0, verified.stderr
    assert '752 train, 50 validation' in verified.stdout


def settings(data_dir: Path, **overrides):
    from tests import harness

    small = {
        'global_batch_size': 8, 'bn_span': 4, 'micro_batch_size': 4, 'warmup_epochs': 0,
        'division': 'open', 'seed': 1,
    }  # fmt: skip
    return harness.resolve('imagenet', data_dir, **(small | overrides))


def test_a_network_trains_on_the_prepared_records(prepared):
    """A small one; ResNet-50's outputs and gradients at this size are compared with others'."""
    from tests import harness

    config = settings(prepared)
    trained = harness.train(config, steps=2, task_type=harness.TinyBottleneck)
    losses = [metrics['loss'] for metrics in trained.measured()]
    assert np.isfinite(losses).all()
    images = [batch['image'] for batch in trained.batches]
    assert {image.shape for image in images} == {(4, 224, 224, 3)}


def test_a_broken_record_stops_training_by_its_name(prepared, tmp_path):
    import shutil

    from input_pipeline import Share
    from tests.data_preparation.test_verify import edit_shard, replace_image
    from workloads.resnet import images
    from workloads.resnet.records import find_dataset, parse

    directory = tmp_path / 'imagenet2012' / '5.1.0'
    shutil.copytree(prepared / 'imagenet2012' / '5.1.0', directory)
    broken = []

    def cut(records):
        broken.append(parse(records[2]).name.decode())
        return [*records[:2], replace_image(records[2], lambda i: i[: len(i) // 2]), *records[3:]]

    shard = sorted(directory.glob('*-train.*'))[7]
    edit_shard(shard, cut)
    dataset = find_dataset('imagenet2012', str(tmp_path))
    share = Share(0, 32, 32)
    pipeline = images.pipeline(dataset, settings(tmp_path), 1, share)
    with pytest.raises(Exception, match=rf'{broken[0]}.*truncated JPEG') as caught:
        for _ in pipeline.train(0, 752 // 32 + 1):
            pass
    assert shard.name in str(caught.value)
    assert 'position' in str(caught.value)
    verified = finished('verify', 'imagenet2012', tmp_path, '--full')
    assert verified.returncode == 2
    assert f'record 2 of {shard.name} ({broken[0]}): truncated JPEG' in verified.stderr
