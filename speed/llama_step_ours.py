# SPDX-License-Identifier: Apache-2.0
"""This repository as a contestant of speed/llama_step.py: what `main.py` runs, on all devices.

python -m speed.llama_step_ours '{"model": …}'

steps N     seconds for N optimizer steps on a batch that lies on the devices
fingerprint 0  of the state, after all steps so far
memory 0    the most bytes that a device had in use so far; 0 where it does not count
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fingerprints
import train_lib
from models.llama.architectures import ARCHITECTURES
from settings import backend, loading
from speed import contestants
from training import compilation
from training.workload import model_of, plan_of
from workloads import by_name
from workloads.llama31_8b.corpora import Corpus
from workloads.llama31_8b.workload import WORKLOAD


def contestant(case: dict[str, Any]) -> tuple[dict[str, Any], contestants.Commands]:
    """Its facts and commands; `case`: the flags of speed/llama_step.py."""
    backend.prepare(deterministic=True, micro_batches=1)
    devices, batch = jax.device_count(), case['batch'] * case['accumulation']
    fields = {
        'model': case['model'],
        'sequence_length': case['length'],
        'micro_batch_size': case['batch'],
        'global_batch_size': devices * batch,
        'dtype': case['dtype'],
        'eval_samples': 1,
        'seed': 1,
    }
    config = by_name.configure(dict(loading.load('configs/speeches.py')) | fields, {})
    nowhere = Corpus('speeches', Path(), Path(), num_train=10**6, num_eval=1, digest=None)
    plan = plan_of(WORKLOAD, config, nowhere, devices)
    model, mesh = model_of(WORKLOAD, config, plan, nowhere), compilation.make_mesh()
    train = compilation.trace_train(model, plan.micro_batch_size, mesh).lower().compile()
    state: Any = compilation.initial_state(1, model, mesh)
    vocabulary = ARCHITECTURES[case['model']].vocabulary
    shape = (plan.micro_step_size, case['length'] + 1)
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
    data = compilation.split(mesh, {'tokens': tokens, 'is_real': np.ones(len(tokens), bool)})

    def steps(count: int) -> float:
        nonlocal state
        jax.block_until_ready(state)
        before = time.perf_counter()
        for _ in range(count * plan.accumulation_steps):
            state, _ = train(state, data)
        jax.block_until_ready(state)
        return time.perf_counter() - before

    def fingerprint(_: int) -> str:
        saved = train_lib.to_saved(state)
        return fingerprints.shown(jax.jit(fingerprints.of)(saved))

    def memory(_: int) -> int:
        return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)

    steps(1)
    kind = jax.devices()[0].device_kind
    facts = {'version': f'JAX {jax.__version__}', 'device': kind, 'devices': devices}
    return facts, {'steps': steps, 'fingerprint': fingerprint, 'memory': memory}


if __name__ == '__main__':
    contestants.serve(lambda: contestant(json.loads(sys.argv[1])))
