# SPDX-License-Identifier: Apache-2.0
"""A workload as unlike image classification as the contract allows: a line fitted to noise.

Vectors go in, one number comes out; the model has no running statistics, the metric is a mean
squared error, which must fall, and evaluations are counted in samples.
"""

import dataclasses
import os
import signal
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from exact_sums import NOT_SPLIT
from input_pipeline import Batch, Pipeline, Share, generator, shuffled
from settings.hyperparameters import Config, field
from settings.plan import Course, Evaluation, Plan, Ruleset, Target
from settings.rules import POSITIVE, Rule, division
from train_lib import gradient_of
from training.workload import Optimizer, Workload

WIDTH, PURPOSE, NOISE = 5, 7, 0.1
SLOPE = np.arange(1.0, WIDTH + 1, dtype=np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DummyConfig(Config):
    """The fields of the dummy."""

    learning_rate: float = field(Rule('> 0', lambda value: value > 0), 'Of plain descent.')
    eval_every_samples: int = field(POSITIVE, 'Training samples between evaluations.')
    max_samples: int = field(POSITIVE, 'The run is aborted if it has not met the target by then.')
    target_error: float = field(Rule('> 0', lambda value: value > 0), 'That ends the run.')
    stop_at: int | None = field(
        POSITIVE, 'Training position at which the run gets SIGTERM.', group='run'
    )
    division: str = field(division({'seed': None}), 'MLPerf division.', group='run')


def config(**overrides: str) -> dict[str, Any]:
    """Values of a configuration that meets its target after some evaluations."""
    values = {
        'benchmark': 'dummy', 'model': 'line', 'dataset': 'noise', 'global_batch_size': 16,
        'optimizer': 'descent', 'dtype': 'float32', 'seed': None, 'init_from': None,
        'micro_batch_size': 1, 'data_processes': 0, 'data_threads': None, 'deterministic': True,
        'data_dir': 'unused', 'log_every_steps': 2, 'checkpoint_every_steps': 3,
        'stall_seconds': None, 'drop_page_cache': False, 'division': 'open', 'org': 'reference',
        'platform': 'unknown', 'status': 'research', 'learning_rate': 0.2,
        'eval_every_samples': 64, 'max_samples': 1024, 'target_error': 0.05,
        'stop_at': None,
    }  # fmt: skip
    return values | overrides


@dataclasses.dataclass(frozen=True)
class Noise:
    """The data set, drawn and not read."""

    name: str = 'noise'
    num_train: int = 200
    num_eval: int = 30
    digest: str | None = 'noise'


@dataclasses.dataclass(frozen=True)
class Points:
    """A split of it; see `input_pipeline.Source`."""

    count: int
    first: int
    stop_at: int | None = None

    def __len__(self) -> int:
        return self.count

    def _batch(self, indices: np.ndarray, size: int) -> Batch:
        x = np.zeros((size, WIDTH), np.float32)
        y, counts = np.zeros(size, np.float32), np.zeros(size, bool)
        for row, index in enumerate(indices):
            rng = generator(0, PURPOSE, self.first + int(index))
            x[row], counts[row] = rng.standard_normal(WIDTH), True
            y[row] = x[row] @ SLOPE + NOISE * rng.standard_normal()
        return {'x': x, 'y': y, 'counts': counts}

    def train(self, positions: np.ndarray, seed: int) -> Batch:
        """Points as they are."""
        if self.stop_at in positions:
            os.kill(os.getpid(), signal.SIGTERM)
        return self._batch(shuffled(positions, len(self), seed), len(positions))

    def evaluation(self, indices: np.ndarray, size: int) -> Batch:
        """Points, then some that do not count."""
        return self._batch(indices, size)


@dataclasses.dataclass(frozen=True)
class Line:
    """The model with its loss; see `train_lib.Task`."""

    dtype: str
    split = NOT_SPLIT

    def abstract_batch(self, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        return {
            'x': jax.ShapeDtypeStruct((examples, WIDTH), np.float32),
            'y': jax.ShapeDtypeStruct((examples,), np.float32),
            'counts': jax.ShapeDtypeStruct((examples,), np.bool_),
        }

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The slope."""
        return {'params': {'slope': jax.random.normal(key, (WIDTH,))}}

    def _errors(self, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        return jnp.square(batch['x'] @ variables['params']['slope'] - batch['y'])

    def train_loss(self, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]):
        """Mean squared error; there are no statistics."""
        loss = self._errors(variables, batch).mean()
        return loss, ({'loss': loss}, {})

    def gradient(self, variables, batch, scale, form):
        """Of `train_loss`."""
        del form
        return gradient_of(self.train_loss, variables, batch, scale)

    def evaluate(self, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]):
        """Errors of the points that count."""
        errors = jnp.where(batch['counts'], self._errors(variables, batch), 0.0)
        return {'error': errors, 'examples': batch['counts']}

    def quality(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The mean squared error."""
        return {'eval_loss': sums['error'] / sums['examples']}


class Dummy:
    """The workload; see training/workload.py."""

    head: tuple[str, ...] = ('params', 'none')

    def data(self, config: DummyConfig) -> Noise:
        """It is always there."""
        return Noise()

    def check(self, config: DummyConfig, dataset: Noise) -> None:
        """All fits."""

    def course(self, config: DummyConfig, num_train: int) -> Course:
        """Evaluations by samples."""
        batch, every = config.global_batch_size, config.eval_every_samples
        counts = range(every, config.max_samples + 1, every)
        evaluations = tuple(
            Evaluation(
                step=-(-count // batch),
                count=count,
                block_start={'samples_count': count - every},
                block_stop={'samples_count': count},
                result={'samples_count': count},
            )
            for count in counts
        )
        return Course(
            evaluations=evaluations,
            target=Target('eval_loss', 'squared error', config.target_error, at_least=False),
            unit='samples',
            examples_per_unit=1,
            examples='points',
            ruleset=Ruleset('4.0.0'),
        )

    def warnings(
        self, base: Mapping[str, Any], overrides: Mapping[str, str], config: DummyConfig
    ) -> list[str]:
        """None."""
        return []

    def pipeline(
        self, config: DummyConfig, dataset: Noise, seed: int | None, share: Share
    ) -> Pipeline:
        """Points of the two splits."""
        train = Points(dataset.num_train, 0, config.stop_at)
        evaluation = Points(dataset.num_eval, dataset.num_train)
        return Pipeline(train, evaluation, seed=seed, share=share, processes=config.data_processes)

    def task(self, config: DummyConfig, dataset: Noise) -> Line:
        """The line."""
        return Line(config.dtype)

    def particulars(self, config: DummyConfig) -> Mapping[str, str]:
        """The form of the model."""
        return {'form': 'a line'}

    def optimizer(self, config: DummyConfig, plan: Plan) -> Optimizer:
        """Plain descent."""
        schedule = optax.constant_schedule(config.learning_rate)
        return Optimizer(optax.sgd(schedule), schedule)


WORKLOAD: Workload = Dummy()
