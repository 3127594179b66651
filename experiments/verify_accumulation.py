# SPDX-License-Identifier: Apache-2.0
"""Shows that gradient accumulation emulates a large batch: docs/accumulation.md is made by this.

    verify_accumulation.py --data_dir=DIR [--seeds=3] [--out=docs]

Trains the digits with B = 128 and bn_span S = 8, split in every way D·M·k over devices and
accumulation steps: k = 1, 2, 4, 8, 16 on one device, and 2, 4, 8 (host) devices. And, for contrast,
as it is usually done: BatchNorm over whatever a micro-batch holds, running statistics moved at
every micro-step (`usual_optimizer`; the rest of the code is the same). Each way runs from the same
seeds, once for 30 steps at a gentle rate, where rounding is hardly amplified, and once at the
recipe's own rate to the target. Writes accumulation.json and .png, and the tables into
accumulation.md, between the comments that name them.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import train_lib
from input_pipeline import Pipeline
from settings import backend
from settings.plan import Plan
from tests import harness
from training import evaluation, processes
from training.run import Model
from training.workload import plan_of
from workloads.resnet import optimizers
from workloads.resnet.fields import ResNetConfig
from workloads.resnet.records import find_dataset
from workloads.resnet.workload import WORKLOAD

SPAN, GENTLE_STEPS = 8, 30
# Small steps: at the recipe's rate training amplifies any difference of rounding.
GENTLE = {'optimizer': 'sgd', 'learning_rate': 0.002, 'decay_steps': 1000}


class Way(NamedTuple):
    """A way to split the global batch: D devices, M examples each, k = B / (D·M)."""

    devices: int
    per_device_batch: int
    usual: bool = False


ONE_DEVICE = [Way(1, m) for m in (128, 64, 32, 16, 8)]
WAYS = [*ONE_DEVICE, Way(2, 64), Way(4, 32), Way(8, 16)]
USUAL = [Way(1, m, usual=True) for m in (128, 32, 8)]


def usual_optimizer(config: ResNetConfig, plan: Plan) -> optax.MultiSteps:
    """As a run's, but the running statistics move at every micro-step."""
    schedule = optimizers.learning_rate_schedule(config, plan.num_train)
    weights = train_lib.accumulated(
        optimizers.of_weights(config, schedule), plan.accumulation_steps
    ).gradient_transformation()
    return train_lib.accumulated(optimizers.with_statistics(weights), 1)


class Experiment:
    """One way, compiled once, run from several seeds."""

    def __init__(self, way: Way, data_dir: str, **overrides: Any):
        batch = way.per_device_batch
        span = batch if way.usual else SPAN
        self.config = harness.resolve(
            'digits', data_dir, bn_span=span, per_device_batch=batch, **overrides
        )
        self.dataset = find_dataset(self.config.dataset, data_dir)
        self.plan = plan_of(WORKLOAD, self.config, self.dataset, way.devices)
        model = Model.of(WORKLOAD, self.config, self.plan, self.dataset)
        if way.usual:
            optimizer = usual_optimizer(self.config, self.plan)
            model = dataclasses.replace(model, optimizer=optimizer)
        self.model, self.mesh = model, Mesh(jax.devices()[: way.devices], (train_lib.AXIS,))
        self.programs = train_lib.compile_steps(
            model.task, model.optimizer, model.schedule, self.plan.micro_batch, self.mesh
        )
        self.name = f'D={way.devices} M={batch} k={self.plan.accumulation_steps}'

    def _batches(self, seed: int) -> Pipeline:
        share = processes.local_share(self.mesh, self.plan.micro_batch)
        return WORKLOAD.pipeline(self.config, self.dataset, seed, share)

    def evaluate(self, variables: train_lib.Variables) -> float:
        """Top-1 accuracy on the evaluation set."""
        batches = self._batches(0).evaluation()
        sums = evaluation.total(self.programs.evaluate, variables, batches, self.mesh)
        assert sums is not None
        return self.model.task.quality(sums)[self.plan.target.metric]

    def steps(self, seed: int, last: int) -> Iterator[tuple[train_lib.Variables, float]]:
        """The variables and the loss after every optimizer step."""
        k, losses = self.plan.accumulation_steps, []
        first = train_lib.initial_state(seed, self.model.task, self.model.optimizer)
        state = train_lib.replicate(self.mesh, first)
        for i, batch in enumerate(self._batches(seed).train(0, last * k), start=1):
            state, metrics = self.programs.train(state, train_lib.split(self.mesh, batch))
            losses.append(metrics['loss'].item())
            if i % k == 0:
                yield state.variables, float(np.mean(losses))
                losses = []

    def gentle(self, seed: int) -> list[train_lib.Variables]:
        """The weights and running statistics after every one of the first steps."""
        # Copied: the next step overwrites them.
        return [jax.tree.map(np.array, v) for v, _ in self.steps(seed, GENTLE_STEPS)]

    def to_target(self, seed: int) -> dict[str, Any]:
        """Losses by step and accuracies by epoch, until the target or the last epoch."""
        ends = {at.step: at.count for at in self.plan.evaluations}
        losses, accuracies, epochs = [], [], None
        for step, (variables, loss) in enumerate(self.steps(seed, self.plan.total_steps), start=1):
            losses.append(round(loss, 5))
            if step in ends:
                accuracies.append(self.evaluate(variables))
                if self.plan.target.is_met(accuracies[-1]):
                    epochs = ends[step]
                    break
        return {'losses': losses, 'accuracies': accuracies, 'epochs': epochs}


def apart(a: train_lib.Variables, b: train_lib.Variables) -> float:
    """‖a - b‖ / ‖a‖ over weights or running statistics, the larger of the two."""
    return max(harness.distance(a[collection], b[collection]) for collection in a)


def run(data_dir: str, seeds: int) -> dict[str, Any]:
    """All ways from all seeds."""
    results: dict[str, Any] = {'ours': {}, 'usual': {}}
    reference: dict[tuple[bool, int], list[train_lib.Variables]] = {}
    for way in [*WAYS, *USUAL]:
        gentle = Experiment(way, data_dir, **GENTLE)
        differences = []
        for seed in range(seeds):
            states = gentle.gentle(seed)
            whole = reference.setdefault((way.usual, seed), states)  # k = 1 on one device is first.
            differences.append([apart(a, b) for a, b in zip(whole, states, strict=True)])
        recipe = Experiment(way, data_dir)
        results['usual' if way.usual else 'ours'][recipe.name] = {
            'differences': np.max(differences, axis=0).tolist(),
            'runs': [recipe.to_target(seed) for seed in range(seeds)],
        }
        print(way, f'{max(map(max, differences)):.1e}', flush=True)
    return results


def table(results: Mapping[str, Any]) -> str:
    """A row for each way."""
    lines = ['| split | difference after 1 step | largest in 30 | epochs to the target, by seed |']
    lines += ['|---|---|---|---|']
    for name, result in results.items():
        first, largest = result['differences'][0], max(result['differences'])
        epochs = ', '.join(str(r['epochs'] or 'missed') for r in result['runs'])
        lines.append(f'| {name} | {first:.1e} | {largest:.1e} | {epochs} |')
    return '\n'.join(lines)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Curves of the first seed, overlaid: ours above, the usual way below."""
    import matplotlib as mpl

    mpl.use('agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout='constrained')
    for row, kind in zip(axes, ('ours', 'usual'), strict=True):
        for name, result in results[kind].items():
            first = result['runs'][0]
            row[0].plot(first['losses'], linewidth=0.8)
            row[1].plot(range(1, len(first['accuracies']) + 1), first['accuracies'], linewidth=0.8)
            steps = range(1, GENTLE_STEPS + 1)
            row[2].semilogy(steps, np.maximum(result['differences'], 1e-9), label=name)
        row[0].set(title=f'{kind}: training loss', xlabel='step')
        row[1].set(title=f'{kind}: top-1', xlabel='epoch', ylim=(0.8, 1))
        row[2].set(title=f'{kind}: ‖difference‖ to k=1, low rate', xlabel='step', ylim=(1e-9, 20))
        row[2].legend(fontsize=6)
    figure.savefig(path, dpi=80)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='data')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--out', type=Path, default=Path('docs'))
    flags = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    backend.set_xla_flags('--xla_force_host_platform_device_count=8')
    results = run(flags.data_dir, flags.seeds)
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / 'accumulation.json').write_text(json.dumps(results))
    plot(results, flags.out / 'accumulation.png')
    page = flags.out / 'accumulation.md'
    text = (
        page.read_text() if page.exists() else '<!-- ours --><!-- / -->\n<!-- usual --><!-- / -->\n'
    )
    for kind in ('ours', 'usual'):
        before, _, rest = text.partition(f'<!-- {kind} -->')
        after = rest.partition('<!-- / -->')[2]
        text = f'{before}<!-- {kind} -->\n{table(results[kind])}\n<!-- / -->{after}'
    page.write_text(text)


if __name__ == '__main__':
    main()
