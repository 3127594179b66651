# SPDX-License-Identifier: Apache-2.0
"""Prints what this process is given to train on: position, and digest of the example, by line.

batch_digests.py DATA_DIR STEPS --coordinator=… --num_processes=N --process_id=I
"""

import argparse
import hashlib

from tests import harness
from training import compilation, processes
from workloads.resnet import images
from workloads.resnet.records import find_dataset

parser = argparse.ArgumentParser()
parser.add_argument('data_dir')
parser.add_argument('steps', type=int)
parser.add_argument('--coordinator')
parser.add_argument('--num_processes', type=int)
parser.add_argument('--process_id', type=int)
flags = parser.parse_args()
processes.initialize(flags.coordinator, flags.num_processes, flags.process_id, timeout=300)
config = harness.resolve('digits', flags.data_dir, seed=7)
share = processes.local_share(compilation.make_mesh(), config.global_batch_size)
pipeline = images.pipeline(find_dataset('digits', flags.data_dir), config, 7, share)
for step, batch in enumerate(pipeline.train(0, flags.steps)):
    for i in range(share.size):
        digest = hashlib.sha256(batch['image'][i].tobytes() + batch['label'][i].tobytes())
        print('example', step * share.whole + share.start + i, digest.hexdigest())
