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
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import train_lib
from configs import digits
from input_pipeline import Pipeline
from settings import backend, hyperparameters
from settings.plan import Plan
from training import evaluation, processes
from training.train_loop import Model
from training.workload import plan_of
from workloads.resnet import images, optimizers
from workloads.resnet.fields import ResNetConfig
from workloads.resnet.records import find_dataset
from workloads.resnet.workload import WORKLOAD

backend.set_xla_flags('--xla_force_host_platform_device_count=8')

SPAN, GENTLE_STEPS = 8, 30
# Small steps: at the recipe's rate training amplifies any difference of rounding.
GENTLE = {'optimizer': 'sgd', 'learning_rate': '0.002', 'decay_steps': '1000'}


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to split the global batch: D devices, M examples each, k = B / (D·M)."""

    devices: int
    per_device_batch: int
    usual: bool = False

    def name(self) -> str:
        """For tables and curves."""
        steps = digits.get_config().global_batch_size // (self.devices * self.per_device_batch)
        return f'D={self.devices} M={self.per_device_batch} k={steps}'


ONE_DEVICE = [Way(1, m) for m in (128, 64, 32, 16, 8)]
WAYS = [*ONE_DEVICE, Way(2, 64), Way(4, 32), Way(8, 16)]
USUAL = [Way(1, m, usual=True) for m in (128, 32, 8)]


def usual_optimizer(config: ResNetConfig, plan: Plan) -> optax.MultiSteps:
    """As a run's, but the running statistics move at every micro-step."""
    schedule = optimizers.learning_rate_schedule(config, plan.num_train)
    if config.optimizer == 'lars':
        weights = optimizers.lars(
            schedule, config.momentum, config.weight_decay, config.lars_epsilon
        )
    else:
        weights = optimizers.sgd(schedule, config.momentum, config.weight_decay)
    weights = train_lib.accumulated(weights, plan.accumulation_steps).gradient_transformation()
    statistics = optimizers.moving_average(optimizers.BATCH_NORM_MOMENTUM)
    both = optax.partition(
        {'weights': weights, 'statistics': statistics},
        {'params': 'weights', 'batch_stats': 'statistics'},
    )
    return train_lib.accumulated(both, 1)


class Experiment:
    """One way, compiled once, run from several seeds."""

    def __init__(self, way: Way, data_dir: str, overrides: Mapping[str, str]):
        own = {'bn_span': str(way.per_device_batch if way.usual else SPAN)}
        own |= {'per_device_batch': str(way.per_device_batch), 'data_dir': data_dir}
        base = digits.get_config()
        self.config = hyperparameters.resolve(ResNetConfig, base, dict(overrides) | own)
        self.dataset = find_dataset('digits', data_dir)
        self.plan = plan_of(WORKLOAD, self.config, self.dataset, way.devices)
        self.model = Model.of(WORKLOAD, self.config, self.plan, self.dataset)
        if way.usual:
            optimizer = usual_optimizer(self.config, self.plan)
            self.model = dataclasses.replace(self.model, optimizer=optimizer)
        self.mesh = Mesh(np.array(jax.devices()[: way.devices]), (train_lib.AXIS,))
        self.programs = train_lib.compile_steps(
            self.model.task,
            self.model.optimizer,
            self.model.schedule,
            self.plan.micro_batch,
            self.mesh,
        )
        self.share = processes.share_of(self.mesh, self.plan.micro_batch)

    def _pipeline(self, seed: int) -> Pipeline:
        return images.pipeline(self.dataset, self.config, seed, self.share)

    def evaluate(self, state: train_lib.TrainState) -> float:
        """Top-1 accuracy on the evaluation set."""
        batches = self._pipeline(0).evaluation()
        sums = evaluation.total(self.programs.evaluate, state.variables, batches, self.mesh)
        assert sums is not None
        return self.model.task.quality(sums)[self.plan.target.metric]

    def steps(self, seed: int, last: int) -> Iterator[tuple[train_lib.TrainState, float]]:
        """The state and the loss after every optimizer step."""
        k, model = self.plan.accumulation_steps, self.model
        first = train_lib.initial_state(seed, model.task, model.optimizer)
        state, losses = train_lib.replicate(self.mesh, first), []
        for i, batch in enumerate(self._pipeline(seed).train(0, last * k)):
            state, metrics = self.programs.train(state, train_lib.split(self.mesh, batch))
            losses.append(metrics['loss'].item())
            if (i + 1) % k == 0:
                yield state, float(np.mean(losses))
                losses = []

    def gentle(self, seed: int) -> list[Any]:
        """The weights and running statistics after every one of the first steps."""
        return [jax.device_get(s.variables) for s, _ in self.steps(seed, GENTLE_STEPS)]

    def to_target(self, seed: int) -> dict[str, Any]:
        """Losses by step and accuracies by epoch, until the target or the last epoch."""
        ends = {e.step: e.count for e in self.plan.evaluations}
        losses, accuracies = [], []
        for step, (state, loss) in enumerate(self.steps(seed, self.plan.total_steps), start=1):
            losses.append(round(loss, 5))
            if step in ends:
                accuracies.append(self.evaluate(state))
                if accuracies[-1] >= self.config.target_top1:
                    break
        reached = accuracies[-1] >= self.config.target_top1
        epochs = list(ends.values())[len(accuracies) - 1] if reached else None
        return {'losses': losses, 'accuracies': accuracies, 'epochs': epochs}


def apart(a: Any, b: Any) -> float:
    """‖a - b‖ / ‖a‖ over weights or running statistics, the larger of the two."""

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))

    return max(norm(jax.tree.map(np.subtract, a[c], b[c])) / norm(a[c]) for c in a)


def run(data_dir: str, seeds: int) -> dict[str, Any]:
    """All ways from all seeds."""
    results: dict[str, Any] = {'ours': {}, 'usual': {}}
    reference: dict[tuple[bool, int], Any] = {}
    for way in [*WAYS, *USUAL]:
        gentle = Experiment(way, data_dir, GENTLE)
        differences = []
        for seed in range(seeds):
            states = gentle.gentle(seed)
            whole = reference.setdefault((way.usual, seed), states)  # k = 1 on one device is first.
            differences.append([apart(a, b) for a, b in zip(whole, states, strict=True)])
        recipe = Experiment(way, data_dir, {})
        results['usual' if way.usual else 'ours'][way.name()] = {
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
