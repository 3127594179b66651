# SPDX-License-Identifier: Apache-2.0
"""Shows that gradient accumulation emulates a large batch: docs/accumulation.md is made by this.

    verify_accumulation.py --data_dir=DIR [--seeds=10] [--out=docs]

Trains the digits (B = 128, the recipe of known_fingerprints.py) to their target, with the batch
split over D devices and k accumulation steps in several ways, from the same seeds, in three
implementations: this one; the same with sums in floating point; and the usual one, in which also
BatchNorm normalises whatever a device holds at a time, and its running statistics move at every
micro-step. Writes accumulation.json and .png, and the table into accumulation.md, between two
comments. Exit status: 0 if in this implementation all splits of every seed have the same
fingerprint at every evaluation, else 1.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import fingerprints
import train_lib
from experiments.known_fingerprints import RECIPE
from experiments.plain_step import Plain, plain_step
from settings import backend
from tests import harness
from training import compilation, evaluation, metrics, processes
from training.workload import model_of, plan_of
from workloads.resnet import optimizers
from workloads.resnet.records import find_dataset
from workloads.resnet.workload import WORKLOAD

BATCH, SPAN, DRAWN_STEPS = RECIPE['global_batch_size'], RECIPE['bn_span'], 60


class Way(NamedTuple):
    """An implementation, and a split: D devices compute G examples each, in k = B / (D·G) steps."""

    implementation: str
    devices: int
    examples: int

    @property
    def split(self) -> str:
        """In words."""
        return f'D={self.devices} k={BATCH // (self.devices * self.examples)}'


WAYS = [
    *(Way('this implementation', devices, SPAN) for devices in (1, 2, 4, 8)),
    *(Way('floating-point sums', *split) for split in ((1, 128), (1, 32), (4, 32), (8, 16))),
    *(Way('the usual one', *split) for split in ((1, 128), (1, 32), (4, 32), (8, 16))),
]


class Experiment:
    """One way, compiled once, run from several seeds."""

    def __init__(self, way: Way, data_dir: str):
        self.way, self.mesh = way, Mesh(jax.devices()[: way.devices], (train_lib.AXIS,))
        span = way.examples if way.implementation == 'the usual one' else SPAN
        fields = {**RECIPE, 'micro_batch_size': way.examples, 'bn_span': span}
        config = harness.resolve('digits', data_dir, **fields)
        self.config, self.dataset = config, find_dataset(config.dataset, data_dir)
        self.plan = plan_of(WORKLOAD, config, self.dataset, way.devices)
        self.model = model_of(WORKLOAD, config, self.plan, self.dataset)
        self.programs = compilation.compile_steps(self.model, way.examples, self.mesh)
        if way.implementation != 'this implementation':
            optimizer = self._plain_optimizer()
            step = functools.partial(plain_step, task=self.model.task, optimizer=optimizer)
            self._init = optimizer.init
            self._plain = compilation.lifted(step, self.mesh, donate_argnums=0)

    def _plain_optimizer(self) -> optax.GradientTransformation:
        plan, weights = self.plan, optimizers.of_weights(self.config, self.model.schedule)
        k = plan.accumulation_steps
        if self.way.implementation == 'the usual one':  # The statistics move at once.
            weights = optax.MultiSteps(weights, k).gradient_transformation()
            return optimizers.with_statistics(weights)
        return optax.MultiSteps(optimizers.with_statistics(weights), k).gradient_transformation()

    def _batches(self, seed: int) -> Any:
        share = processes.local_share(self.mesh, self.plan.micro_step_size)
        return WORKLOAD.pipeline(self.config, self.dataset, seed, share)

    def _micro_steps(self, seed: int) -> Iterator[tuple[train_lib.Variables, Any, float]]:
        """After every micro-step the variables, all that a checkpoint would hold, and the loss."""
        plan = self.plan
        exact = self.way.implementation == 'this implementation'
        state: Any = compilation.initial_state(seed, self.model, self.mesh)
        if not exact:
            variables = jax.device_get(state.variables)
            plain = Plain(variables, jax.device_get(self._init(variables)))
            state = compilation.place(self.mesh, plain)
        micro_steps = plan.total_steps * plan.accumulation_steps
        for batch in self._batches(seed).train(0, micro_steps):
            on_devices = compilation.split(self.mesh, batch)
            if exact:
                state, found = self.programs.train(state, on_devices)
                found = jax.device_get(found)
                loss = metrics.measured([found], plan.micro_batches)['loss']
                yield state.variables, train_lib.to_saved(state), loss * plan.accumulation_steps
            else:
                state, loss = self._plain(state, on_devices)
                yield state.variables, state.variables, float(loss)

    def run(self, seed: int, keep: bool) -> dict[str, Any]:
        """Losses by step, fingerprints and accuracies by epoch; weights of the first steps."""
        ends = {at.step: at.count for at in self.plan.evaluations}
        losses, marks, accuracies, kept, epochs, k = [], [], [], [], None, 0
        for micro, (variables, whole, loss) in enumerate(self._micro_steps(seed), start=1):
            losses.append(loss)
            step, k = divmod(micro, self.plan.accumulation_steps)
            if k == 0 and keep and step <= DRAWN_STEPS:
                kept.append(jax.tree.map(np.array, variables['params']))
            if k == 0 and step in ends:
                tree = jax.tree.map(np.asarray, whole)
                marks.append(fingerprints.shown(fingerprints.of_host_arrays(tree)))
                batches = self._batches(0).evaluation()
                sums = evaluation.total(self.programs.evaluate, variables, batches, self.mesh)
                assert sums is not None
                accuracies.append(self.model.task.quality(sums)[self.plan.target.metric])
                if self.plan.target.is_met(accuracies[-1]):
                    epochs = ends[step]
                    break
        steps = np.reshape(losses, (-1, self.plan.accumulation_steps)).mean(axis=1)
        return {
            'losses': steps.round(5).tolist(), 'fingerprints': marks, 'accuracies': accuracies,
            'epochs': epochs, 'kept': kept,
        }  # fmt: skip


def run(data_dir: str, seeds: int) -> dict[str, Any]:
    """All ways from all seeds: the runs by implementation and split, and how far seed 0 parts."""
    results: dict[str, Any] = {}
    for way in WAYS:
        experiment, of_kind = Experiment(way, data_dir), results.setdefault(way.implementation, {})
        runs = [experiment.run(seed, keep=seed == 0) for seed in range(seeds)]
        kept = [found.pop('kept') for found in runs]
        of_kind[way.split] = {'runs': runs, 'kept': kept[0]}
        epochs = [found['epochs'] for found in runs]
        print(f'{way.implementation}, {way.split}: epochs {epochs}', flush=True)
    for of_kind in results.values():
        first = next(iter(of_kind.values()))['kept']
        for found in of_kind.values():
            pairs = zip(first, found['kept'], strict=False)
            found['apart'] = [harness.distance(a, b) for a, b in pairs]
        for found in of_kind.values():
            del found['kept']
    return results


def same(of_kind: Mapping[str, Any]) -> int:
    """Of how many seeds all splits have the same fingerprints."""
    marks = [[run['fingerprints'] for run in found['runs']] for found in of_kind.values()]
    return sum(
        all(split == by_split[0] for split in by_split) for by_split in zip(*marks, strict=True)
    )


def table(results: Mapping[str, Any]) -> str:
    """A row for each split."""
    lines = ['| implementation | split | apart after 5 steps | after 60 | epochs to the target |']
    lines += ['|---|---|---|---|---|']
    for kind, of_kind in results.items():
        for split, found in of_kind.items():
            epochs = ', '.join(str(run['epochs'] or 'missed') for run in found['runs'])
            apart = f'{found["apart"][4]:.1e} | {found["apart"][-1]:.1e}'
            lines.append(f'| {kind} | {split} | {apart} | {epochs} |')
    return '\n'.join(lines)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """How far the weights of every split are from those of the first, by step."""
    import matplotlib as mpl

    mpl.use('agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout='constrained')
    colours = dict(zip(results, ('tab:green', 'tab:orange', 'tab:red'), strict=True))
    zero = 1e-9
    for kind, of_kind in results.items():
        for i, (split, found) in enumerate(list(of_kind.items())[1:]):
            steps = range(1, len(found['apart']) + 1)
            axes.semilogy(
                steps, np.maximum(found['apart'], zero), ('-', '--', ':')[i], color=colours[kind],
                label=f'{kind}: {split}', linewidth=2.5 if kind == 'this implementation' else 1.2,
            )  # fmt: skip
    axes.set(
        xlabel='optimizer step', xlim=(1, DRAWN_STEPS), ylim=(zero / 3, 10),
        ylabel='‖difference of weights‖ / ‖weights‖',
        title='One seed, one batch, split in other ways: how far weights are apart',
    )  # fmt: skip
    axes.set_yticks(
        [zero, *(10.0**n for n in range(-8, 2))], ['0', *(f'$10^{{{n}}}$' for n in range(-8, 2))]
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc='center right')
    figure.savefig(path, dpi=100)


def main() -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='data')
    parser.add_argument('--seeds', type=int, default=10)
    parser.add_argument('--out', type=Path, default=Path('docs'))
    flags = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    backend.configure('--xla_force_host_platform_device_count=8')
    results = run(flags.data_dir, flags.seeds)
    agreed = same(results['this implementation'])
    print(f'{agreed} of {flags.seeds} seeds: the same fingerprints for every split')
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / 'accumulation.json').write_text(json.dumps(results))
    plot(results, flags.out / 'accumulation.png')
    page, start, end = flags.out / 'accumulation.md', '<!-- table -->', '<!-- / -->'
    text = page.read_text() if page.exists() else start + end
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    page.write_text(f'{before}{start}\n{table(results)}\n{end}{after}')
    return 0 if agreed == flags.seeds else 1


if __name__ == '__main__':
    sys.exit(main())
