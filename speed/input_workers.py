# SPDX-License-Identifier: Apache-2.0
"""The contestants of speed/input.py, each a process that makes batches when told to.

    python -m speed.input_workers NAME FOLDER IMAGE_SIZE BATCH_SIZE

    batches N   wall seconds for N batches, and CPU seconds of all processes

All train on the same JPEGs with the same crop parameters: `FOLDER/jpegs/*`, which `FOLDER/data` has
as records. NAME is one of:

    raw     decode + crop + resize in one thread per core, no framework, from memory: the ceiling
    ours    this repository's pipeline, from ArrayRecord to uint8 batches, in threads
    split   the same in one process per core
    tfdata  the official recipe: fused decode-and-crop, old-grid bilinear resize, float32 batches
    torch   a DataLoader with one process per core, Pillow, from files, uint8 batches
"""

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from speed.contestants import Commands, serve

CORES = len(os.sched_getaffinity(0))
READY_AT_MOST = 4 * CORES + 4  # batches that a contestant may hold; `split` four a process


def jpegs(folder: Path) -> list[bytes]:
    """The encoded images, in memory."""
    return [path.read_bytes() for path in sorted((folder / 'jpegs').iterdir())]


def raw(folder: Path, size: int, batch: int) -> Iterator[object]:
    """The ceiling: decode, crop and resize alone, in one thread per core."""
    from input_pipeline import AUGMENTATION, generator
    from workloads.resnet.image_preprocessing import decode_and_random_crop

    images, positions = itertools.cycle(jpegs(folder)), itertools.count()

    def read(encoded: bytes, position: int) -> np.ndarray:
        rng = generator(1, AUGMENTATION, position)
        return decode_and_random_crop(encoded, rng, size=size)

    def start() -> Iterator[np.ndarray]:
        return pool.map(read, itertools.islice(images, batch), positions)

    with ThreadPoolExecutor(CORES) as pool:
        following = start()
        while True:
            current, following = following, start()
            yield list(current)


def ours(folder: Path, size: int, batch: int, processes: int = 0) -> Iterator[object]:
    """This pipeline, in threads or in so many processes."""
    from input_pipeline import Pipeline, Share
    from workloads.resnet.images import Images
    from workloads.resnet.records import Records, find_dataset

    dataset = find_dataset('imagenet2012', str(folder / 'data'))
    images = Images(
        Records(dataset, 'train'),
        dataset.num_train,
        image_size=size,
        augmentation='crop_resize',
        cache_gib=0,
        threads=1 if processes else CORES,
    )
    share = Share(0, batch, batch)
    pipeline = Pipeline(images, images, seed=1, share=share, processes=processes)
    yield from pipeline.train(0, 1 << 30)


def tfdata(folder: Path, size: int, batch: int) -> Iterator[object]:
    """The official recipe in tf.data."""
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    import tensorflow as tf

    # TensorFlow reads no ArrayRecord: the same images as TFRecords, in the page cache as ours are.
    records = folder / 'images.tfrecord'
    with tf.io.TFRecordWriter(str(records)) as writer:
        for image in jpegs(folder):
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))
            features = tf.train.Features(feature={'image/encoded': feature})
            writer.write(tf.train.Example(features=features).SerializeToString())
    whole = tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4])

    def preprocess(serialized):
        schema = {'image/encoded': tf.io.FixedLenFeature([], tf.string)}
        encoded = tf.io.parse_single_example(serialized, schema)['image/encoded']
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            bounding_boxes=whole,
            min_object_covered=0.1,
            aspect_ratio_range=[0.75, 1.33],
            area_range=[0.05, 1.0],
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        (y, x, _), (height, width, _) = tf.unstack(begin), tf.unstack(extent)
        window = tf.stack([y, x, height, width])
        image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        image = tf.image.random_flip_left_right(image)
        image = tf.compat.v1.image.resize(
            image, [size, size], tf.image.ResizeMethod.BILINEAR, align_corners=False
        )
        image.set_shape([size, size, 3])
        return image - tf.constant([120.0, 120.0, 120.0])  # Any means take the same time.

    dataset = tf.data.TFRecordDataset([str(records)]).repeat()
    dataset = dataset.map(preprocess, num_parallel_calls=tf.data.AUTOTUNE)
    yield from dataset.batch(batch, drop_remainder=True).prefetch(2)


def torch(folder: Path, size: int, batch: int) -> Iterator[object]:
    """A DataLoader with Pillow."""
    import torch
    from PIL import Image

    from workloads.resnet.image_preprocessing import sample_crop

    paths = sorted((folder / 'jpegs').iterdir())

    class Jpegs(torch.utils.data.IterableDataset):
        def __iter__(self):
            worker = torch.utils.data.get_worker_info()
            assert worker  # This runs in a process of the DataLoader.
            rng = np.random.default_rng(worker.id)
            for path in itertools.cycle(paths):
                image = Image.open(path).convert('RGB')
                y, x, height, width = sample_crop(image.height, image.width, rng)
                box = (x, y, x + width, y + height)
                image = image.resize((size, size), Image.Resampling.BILINEAR, box)
                if rng.random() < 0.5:
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                yield torch.from_numpy(np.array(image))

    yield from torch.utils.data.DataLoader(Jpegs(), batch, num_workers=CORES)


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children, which all run to its end."""
    seconds = time.process_time()
    for status in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = status.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
    return seconds


def contestant(name: str, folder: Path, size: int, batch: int) -> tuple[dict, Commands]:
    """Its facts, none, and commands; what it had ready is used up first, untimed."""
    makers: dict[str, Callable[[Path, int, int], Iterator[object]]] = {
        'raw': raw,
        'ours': ours,
        'split': functools.partial(ours, processes=CORES),
        'tfdata': tfdata,
        'torch': torch,
    }
    batches = makers[name](folder, size, batch)

    def take(count: int) -> None:
        for _ in range(count):
            next(batches)

    def seconds(count: int) -> tuple[float, float]:
        take(READY_AT_MOST)
        wall, cpu = time.perf_counter(), cpu_seconds()
        take(count)
        return time.perf_counter() - wall, cpu_seconds() - cpu

    take(READY_AT_MOST)
    return {}, {'batches': seconds}


if __name__ == '__main__':
    name, folder, size, batch = sys.argv[1:]
    serve(lambda: contestant(name, Path(folder), int(size), int(batch)))
