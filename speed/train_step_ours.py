# SPDX-License-Identifier: Apache-2.0
"""This repository as a contestant of speed/train_step.py: what `main.py` runs, on all devices.

python -m speed.train_step_ours '{"model": …}'

steps N     seconds for N optimizer steps on a batch that lies on the devices
plain N     the same with averages in floating point instead of exact sums
loop N      the same in the training loop, with its log, metrics and checkpoints
input N     the same, fed by the input pipeline (with a data set)
trace N     the same as steps, traced
ceilings N  TFLOP/s of a matrix product N × N, and GB/s of a copy of 4·N² bytes
costs 0     a device's operations and bytes of a micro-step, by XLA's count
fingerprint 0  of the state, after all steps so far
memory 0    the most bytes that a device had in use so far; 0 where it does not count
"""

import dataclasses
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fingerprints
import train_lib
from experiments.plain_step import Plain, plain_step
from input_pipeline import Pipeline
from run_files.mlperf_log import EventLog
from settings import backend
from speed import cases, contestants
from training import compilation
from training.restoring import Found
from training.run import Run
from training.train_loop import set_up
from workloads.resnet.workload import WORKLOAD


class OnDevices(Pipeline):
    """One batch to train on, again and again, which lies on the devices already."""

    def __init__(self, batch: dict[str, jax.Array]):
        self._batch = batch

    def train(self, first: int, stop: int) -> Iterator[Any]:
        """The batch of every micro-step."""
        return itertools.repeat(self._batch, stop - first)


def seconds(program: Callable[[Any], jax.Array], argument: jax.Array, repeats: int = 10) -> float:
    """Of one of several calls."""
    program(argument).block_until_ready()
    before = time.perf_counter()
    for _ in range(repeats):
        result = program(argument)
    result.block_until_ready()
    return (time.perf_counter() - before) / repeats


class Ours:
    """A run, and what it can be asked.

    Args:
      case: the flags of speed/train_step.py, with one dtype, batch and accumulation.
      workdir: where the run writes.
    """

    def __init__(self, case: dict[str, Any], workdir: Path):
        deterministic = not case['any_order']
        backend.prepare(deterministic, micro_batches=1)
        jax.config.update('jax_compilation_cache_dir', case['cache'])
        devices = jax.device_count()
        prepared = cases.prepare(
            case['config'],
            devices,
            classes=case['classes'],
            data_dir=case['data_dir'],
            bn_span=min(case['batch'], case['span']),
            micro_batch_size=case['batch'],
            global_batch_size=devices * case['batch'] * case['accumulation'],
            checkpoint_every_steps=case['checkpoint_every'],
            log_every_steps=case['log_every'],
            deterministic=deterministic,
            **{name: case[name] for name in ('model', 'image_size', 'dtype')},
        )
        run = set_up(WORKLOAD, *prepared, workdir, EventLog(None), Found(), compilation.make_mesh())
        self._trace, self._parts, self._state = case['trace'], run.parts, run.state
        self._plain: jax.stages.Compiled | None = None
        self._plain_state: Any = None
        self._batch = self._random_batch(prepared.dataset.num_classes)
        on_devices = dataclasses.replace(run.parts, pipeline=OnDevices(self._batch))
        self._loop, self._fed_loop = Run(on_devices, run.state), run

    def ready(self) -> tuple[dict[str, Any], contestants.Commands]:
        """Its facts and commands, after a first step."""
        self.steps(1)
        return self._facts(), {
            'steps': self.steps,
            'plain': self.plain,
            'loop': lambda count: self.loop(self._loop, count),
            'input': lambda count: self.loop(self._fed_loop, count),
            'trace': self.trace,
            'ceilings': self.ceilings,
            'costs': self.costs,
            'fingerprint': self.fingerprint,
            'memory': self.memory,
        }

    def _random_batch(self, num_classes: int) -> dict[str, jax.Array]:
        rng, plan = np.random.default_rng(0), self._parts.plan
        shapes = self._parts.model.task.abstract_batch(plan.micro_step_size)
        batch = {
            'image': rng.integers(0, 256, shapes['image'].shape, np.uint8),
            'label': rng.integers(0, num_classes, shapes['label'].shape, np.int32),
        }
        return compilation.split(self._parts.programs.mesh, batch)

    def _facts(self) -> dict[str, Any]:
        """The device, and what XLA says about the memory of the compiled micro-step."""
        memory = self._parts.programs.train.memory_analysis()
        assert memory
        return {
            'version': f'JAX {jax.__version__}',
            'device': jax.devices()[0].device_kind,
            'devices': self._parts.plan.num_devices,
            'program_bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        }

    def costs(self, _: int) -> dict[str, float]:
        """A device's operations and bytes of a micro-step, by XLA's count."""
        plan, model, programs = self._parts.plan, self._parts.model, self._parts.programs
        # Operations before it is compiled, for libraries' calls hide theirs; and of a CPU's
        # program, for only there does XLA count that early.
        host = jax.sharding.Mesh(jax.devices('cpu')[:1], (train_lib.AXIS,))
        before = compilation.trace_train(model, plan.micro_batch_size, host).lower()
        counted, compiled = before.cost_analysis(), programs.train.cost_analysis()
        assert counted
        assert compiled
        return {'flops': counted['flops'], 'bytes': compiled['bytes accessed']}

    def steps(self, count: int) -> float:
        """Seconds for `count` optimizer steps: nothing but the compiled program."""
        train, state = self._parts.programs.train, self._state
        jax.block_until_ready(state)
        before = time.perf_counter()
        for _ in range(count * self._parts.plan.accumulation_steps):
            state, _ = train(state, self._batch)
        self._state = jax.block_until_ready(state)
        return time.perf_counter() - before

    def plain(self, count: int) -> float:
        """Seconds for `count` optimizer steps that average in floating point."""
        model, plan = self._parts.model, self._parts.plan
        if self._plain is None:
            transformation = WORKLOAD.optimizer(self._parts.config, plan).transformation
            optimizer = optax.MultiSteps(transformation, plan.accumulation_steps)
            step = functools.partial(
                plain_step, task=model.task, optimizer=optimizer.gradient_transformation()
            )
            lifted = compilation.lifted(step, self._parts.programs.mesh, donate_argnums=0)
            variables = jax.tree.map(jnp.copy, self._state.variables)
            state = Plain(variables, optimizer.init(variables))
            sharding = jax.sharding.NamedSharding(self._parts.programs.mesh, compilation.REPLICATED)
            state = jax.device_put(state, sharding)
            self._plain = lifted.lower(state, self._batch).compile()
            self._plain_state, _ = self._plain(state, self._batch)
        state = jax.block_until_ready(self._plain_state)
        before = time.perf_counter()
        for _ in range(count * plan.accumulation_steps):
            state, _ = self._plain(state, self._batch)
        self._plain_state = jax.block_until_ready(state)
        return time.perf_counter() - before

    def loop(self, run: Run, count: int) -> float:
        """Seconds for `count` optimizer steps of the training loop."""
        # There is one state. A run counts its own steps alone, and saves as often as it should.
        run.state = jax.block_until_ready(self._state)
        before = time.perf_counter()
        run.train_block(run.step + count)
        self._state = jax.block_until_ready(run.state)
        after = time.perf_counter()
        if run.parts.saver:
            run.parts.saver.wait()  # Whoever is next has the machine for itself.
        return after - before

    def trace(self, count: int) -> float:
        """Writes a trace of `count` optimizer steps into the case's folder."""
        with jax.profiler.trace(self._trace):
            return self.steps(count)

    def ceilings(self, size: int) -> dict[str, float]:
        """What the device can do: a matrix product in the case's dtype, and a copy."""
        x = jax.random.normal(jax.random.key(0), (size, size), self._parts.config.dtype)
        words = jnp.zeros((size, size), jnp.float32)
        product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
        copy = jax.jit(lambda a: a + 1)
        return {
            'tflops': 2 * size**3 / seconds(product, x) / 1e12,
            'gbytes': 2 * words.nbytes / seconds(copy, words) / 1e9,
        }

    def fingerprint(self, _: int) -> str:
        """Of the state; the same wherever the same number of steps was done."""
        saved = train_lib.to_saved(self._state)
        return fingerprints.shown(self._parts.programs.fingerprints(saved))

    def memory(self, _: int) -> int:
        """The most bytes that the first device had in use so far; 0 where it does not count."""
        return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as folder:
        contestants.serve(lambda: Ours(json.loads(sys.argv[1]), Path(folder)).ready())
