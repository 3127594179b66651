# SPDX-License-Identifier: Apache-2.0
"""The contestants of speed/train_step.py, each in a process of its own.

    python -m speed.train_step_workers ours|pytorch '{"model": …}'

A worker builds its model, trains one step, prints facts about itself as a line of JSON, and then
answers every line of its input, `COMMAND NUMBER`, with a line of JSON:

    steps N    seconds for N optimizer steps on batches that lie on the device (both)
    loop N     the same in the real training loop, with its log, metrics and checkpoints (ours)
    input N    the same, fed by the real input pipeline (ours, with a data set)
    trace N    the same as steps, traced (ours)
    ceilings N TFLOP/s of a matrix product N × N, and GB/s of a copy of 4·N² bytes (ours)
"""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


class Ours:
    """This repository's step and loop: the programs that `main.py` runs, on all devices."""

    def __init__(self, case: dict[str, Any]):
        import main
        from settings import hyperparameters

        span = min(case['batch'], case['span'])
        overrides = {
            'model': case['model'],
            'image_size': case['image_size'],
            'dtype': case['dtype'],
            'per_device_batch': case['batch'],
            'bn_span': span,
            'global_batch_size': span,  # Corrected below, when the devices are known.
            'checkpoint_every_steps': case['checkpoint_every'],
            'log_every_steps': case['log_every'],
            'data_dir': case['data_dir'] or 'data',
            'deterministic': case['deterministic'],
            'division': 'open',
            'seed': 1,
        }
        folder = tempfile.TemporaryDirectory()
        self._trace_folder = case['trace']
        self._folder, workdir = folder, Path(folder.name) / 'run'
        base = main.load_config(case['config'])
        config = dict(base) | overrides
        main.prepare_jax(config)
        import jax

        cache = case['cache'] or f'{folder.name}/compilation_cache'
        jax.config.update('jax_compilation_cache_dir', cache)
        overrides['global_batch_size'] = jax.device_count() * case['batch'] * case['accumulation']
        texts = {name: str(value) for name, value in overrides.items()}
        self.config = hyperparameters.resolve(base, texts)
        self._start(case, workdir)

    def _start(self, case: dict[str, Any], workdir: Path) -> None:
        import jax
        import numpy as np

        import train_lib
        from run_files import mlperf_log
        from run_files.profiling import Trace
        from settings import plan
        from training import processes, train_loop
        from workloads.resnet.records import Dataset, find_dataset

        class Resident(train_lib.Programs):
            """Programs whose batches are on the devices already."""

            def to_devices(self, local):
                there = isinstance(jax.tree.leaves(local)[0], jax.Array)
                return local if there else super().to_devices(local)

        if case['data_dir']:
            dataset = find_dataset(self.config['dataset'], case['data_dir'])
        else:
            counts = (1_281_167, 50_000, case['classes'])
            dataset = Dataset(self.config['dataset'], '', *counts, None, case['image_size'])
        numbers = plan.make_plan(
            self.config,
            num_train=dataset.num_train,
            num_eval=dataset.num_eval,
            num_devices=jax.device_count(),
        )
        workdir.mkdir(parents=True)
        stop, log = processes.StopRequest(), mlperf_log.EventLog(None)
        trace = Trace(workdir / 'profile', None)
        with contextlib.redirect_stdout(sys.stderr):
            self.run = train_loop.Run(self.config, numbers, dataset, workdir, log, stop, trace)
        self.real_input = self.run.pipeline
        programs = self.run.programs
        rng = np.random.default_rng(0)
        size = self.config['image_size']
        self.batch = programs.to_devices(
            {
                'image': rng.integers(0, 256, (numbers.micro_batch, size, size, 3), np.uint8),
                'label': rng.integers(0, dataset.num_classes, numbers.micro_batch).astype(np.int32),
            }
        )
        self.run.programs = Resident(**vars(programs))

    def steps(self, count: int) -> float:
        """Seconds for `count` optimizer steps: nothing but the compiled program."""
        import jax

        run, state = self.run, self.run.state
        flags = run.stop.flags(run.programs)
        jax.block_until_ready(state)
        before = time.perf_counter()
        for _ in range(count * run.plan.accumulation_steps):
            state, _ = run.programs.train(state, self.batch, flags)
        jax.block_until_ready(state)
        run.state = state
        return time.perf_counter() - before

    def _loop(self, count: int, pipeline: Any) -> float:
        import jax

        self.run.pipeline = pipeline
        jax.block_until_ready(self.run.state)
        before = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            self.run.train_block(self.run.step + count)
        jax.block_until_ready(self.run.state)
        return time.perf_counter() - before

    def loop(self, count: int) -> float:
        """Seconds for `count` optimizer steps of the training loop, batches on the device."""

        class OnDevice:
            def train(_, first, stop):
                return (self.batch for _ in range(first, stop))

        return self._loop(count, OnDevice())

    def input(self, count: int) -> float:
        """Seconds for `count` optimizer steps of the training loop, fed by the input pipeline."""
        return self._loop(count, self.real_input)

    def trace(self, count: int) -> float:
        """Writes a trace of `count` optimizer steps into the case's folder."""
        import jax

        with jax.profiler.trace(self._trace_folder):
            return self.steps(count)

    def ceilings(self, size: int) -> dict[str, float]:
        """What the device can do: a matrix product in the case's dtype, and a copy."""
        import jax
        import jax.numpy as jnp

        x = jax.random.normal(jax.random.key(0), (size, size), self.config['dtype'])
        product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
        copy = jax.jit(lambda a: a + 1)

        def seconds(program, argument, repeats=10):
            program(argument).block_until_ready()
            before = time.perf_counter()
            for _ in range(repeats):
                result = program(argument)
            result.block_until_ready()
            return (time.perf_counter() - before) / repeats

        words = jnp.zeros((size, size), jnp.float32)
        return {
            'tflops': 2 * size**3 / seconds(product, x) / 1e12,
            'gbytes': 2 * words.nbytes / seconds(copy, words) / 1e9,
        }

    def facts(self) -> dict[str, Any]:
        """What XLA says about the compiled micro-step, and the device."""
        import jax

        import train_lib
        from workloads.resnet import optimizers

        run, mesh = self.run, self.run.programs.mesh
        memory = run.programs.train.memory_analysis()
        # Of the program before it is compiled: libraries' calls hide their operations afterwards.
        optimizer = optimizers.create(self.config, run.plan)
        lowered, _ = train_lib.lower_steps(run.task, optimizer, run.plan.micro_batch, mesh)
        device = jax.devices()[0]
        return {
            'version': f'JAX {jax.__version__}',
            'device': device.device_kind,
            'devices': jax.device_count(),
            'flops': lowered.cost_analysis()['flops'] / jax.device_count(),
            'bytes': run.programs.train.cost_analysis()['bytes accessed'],
            'program_bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        }

    def memory(self) -> int:
        """The largest number of bytes in use on the device so far; 0 where it does not count."""
        import jax

        return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)


class PyTorch:
    """torchvision's model as PyTorch trains fastest: channels last, autocast, compiled, fused."""

    def __init__(self, case: dict[str, Any]):
        import torch

        from tests.torchvision_models import create

        self.torch, self.case = torch, case
        self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
        torch.manual_seed(0)
        # True fp32, as ours; half precision is not affected.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        model = create(case['model'], case['classes']).to(
            self.device, memory_format=torch.channels_last
        )
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
        )
        half = case['dtype'] != 'float32'
        self.scaler = torch.amp.GradScaler(self.device, enabled=case['dtype'] == 'float16')
        size, batch = case['image_size'], case['batch']
        means = torch.tensor([123.68, 116.78, 103.94], device=self.device)[None, :, None, None]
        image = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        self.image = image.to(self.device, memory_format=torch.channels_last)
        self.label = torch.randint(0, case['classes'], (batch,), device=self.device)
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

        def loss_of(image, label):
            with torch.autocast(self.device, getattr(torch, case['dtype']), enabled=half):
                return criterion(model(image.float() - means), label)

        mode = case['peer_compile']
        self.loss_of = loss_of if mode == 'none' else torch.compile(loss_of, mode=mode)

    def _wait(self) -> None:
        if self.device == 'cuda':
            self.torch.cuda.synchronize()

    def steps(self, count: int) -> float:
        """Seconds for `count` optimizer steps."""
        self._wait()
        before = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            for _ in range(self.case['accumulation']):
                loss = self.loss_of(self.image, self.label) / self.case['accumulation']
                self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self._wait()
        return time.perf_counter() - before

    def facts(self) -> dict[str, Any]:
        """What it is."""
        cuda = self.device == 'cuda'
        return {
            'version': f'PyTorch {self.torch.__version__}',
            'device': self.torch.cuda.get_device_name() if cuda else 'cpu',
            'devices': 1,
        }

    def memory(self) -> int:
        """The largest number of bytes in use on the device so far."""
        return self.torch.cuda.max_memory_allocated() if self.device == 'cuda' else 0


def main(name: str, case: dict[str, Any]) -> None:
    """Serves one contestant."""
    answers, sys.stdout = sys.stdout, sys.stderr  # Nothing else may speak on the line.
    before = time.perf_counter()
    worker = {'ours': Ours, 'pytorch': PyTorch}[name](case)
    worker.steps(1)
    ready = time.perf_counter() - before
    print(json.dumps({'ready': ready} | worker.facts()), file=answers, flush=True)
    for line in sys.stdin:
        command, number = line.split()
        result = {'value': getattr(worker, command)(int(number)), 'memory': worker.memory()}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == '__main__':
    main(sys.argv[1], json.loads(sys.argv[2]))
