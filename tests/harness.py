# SPDX-License-Identifier: Apache-2.0
"""Runs training steps in this process, on as many devices as a test wants."""

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.sharding import Mesh, NamedSharding

import accumulation
import train_lib
from models.resnet.network import ResNet
from settings import hyperparameters
from settings.plan import Plan, make_plan
from training import compilation, metrics, processes
from workloads.resnet import images, optimizers
from workloads.resnet.fields import ResNetConfig
from workloads.resnet.records import find_dataset
from workloads.resnet.task import ImageClassification
from workloads.resnet.workload import WORKLOAD


class TinyBottleneck(ImageClassification):
    """The task with a ResNet-50 in miniature: large stem, max-pool, bottlenecks, projections."""

    shape: Mapping[str, Any] = {'stage_sizes': (1, 2), 'bottleneck': True, 'large_stem': True}

    @property
    def model(self):
        return ResNet(
            **self.shape,
            width=8,
            num_classes=self.num_classes,
            bn_span=self.config.bn_span,
            dtype=jax.numpy.dtype(self.config.dtype),
        )


class OneBlock(TinyBottleneck):
    """The task with the smallest ResNet, for what any network shows: it compiles fastest."""

    shape: Mapping[str, Any] = {'stage_sizes': (1,), 'bottleneck': False, 'large_stem': False}


@dataclasses.dataclass
class Trained:
    """What a few steps left behind: the state, and every batch and metric on the way."""

    state: train_lib.TrainState
    metrics: list[dict[str, Any]]
    batches: list[dict[str, np.ndarray]]
    plan: Plan

    def measured(self) -> list[dict[str, float]]:
        """The metrics of every optimizer step."""
        k = self.plan.accumulation_steps
        steps = [self.metrics[i : i + k] for i in range(0, len(self.metrics), k)]
        return [metrics.measured(step, self.plan.micro_batches) for step in steps]


def resolve(name, data_dir, **overrides) -> ResNetConfig:
    """A committed configuration with overrides."""
    base = importlib.import_module(f'configs.{name}').get_config()
    texts = {key: str(value) for key, value in (overrides | {'data_dir': data_dir}).items()}
    return hyperparameters.resolve(ResNetConfig, base, texts)


def plan_for(config, *, num_train, num_eval=10, num_devices=1) -> Plan:
    """A run's plan, for a training set of any size."""
    course = WORKLOAD.course(config, num_train)
    return make_plan(
        config, course, num_train=num_train, num_eval=num_eval, num_devices=num_devices
    )


def model_for(config, plan, task) -> train_lib.Model:
    """What a run learns, by another task than its own."""
    transformation, schedule = optimizers.create(config, plan)
    optimizer = accumulation.accumulated(
        transformation, plan.accumulation_steps, plan.micro_batches
    )
    return train_lib.Model(task, optimizer, schedule, plan.micro_batches)


@functools.cache
def _compiled(config, task_type, num_train, num_eval, num_classes, devices):
    """Plan, mesh, model and compiled training step: trainings of one kind share them."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (train_lib.AXIS,))
    plan = plan_for(config, num_train=num_train, num_eval=num_eval, num_devices=devices)
    model = model_for(config, plan, task_type(config, num_classes))
    step = compilation.trace_train(model, plan.micro_batch_size, mesh).lower().compile()
    return plan, mesh, model, step


def train(config, *, devices=1, steps=10, task_type=ImageClassification, batches=None) -> Trained:
    """Trains `steps` optimizer steps on `devices` devices of this process.

    Without `batches` (a function from the whole micro-batch's range of positions to a batch), on
    the configuration's data.
    """
    num_train, num_eval, num_classes = 4096, 10, 10
    if batches is None:
        dataset = find_dataset(config.dataset, config.data_dir)
        num_train, num_eval = dataset.num_train, dataset.num_eval
        num_classes = dataset.num_classes
    plan, mesh, model, step = _compiled(
        config, task_type, num_train, num_eval, num_classes, devices
    )
    state = compilation.initial_state(config.seed, model, mesh)
    micro_steps = steps * plan.accumulation_steps
    if batches is None:
        share = processes.local_share(mesh, plan.micro_step_size)
        source = images.pipeline(dataset, config, config.seed, share).train(0, micro_steps)
    else:
        size = plan.micro_step_size
        source = (batches(i * size, (i + 1) * size) for i in range(micro_steps))
    seen, metrics = [], []
    for batch in source:
        state, values = step(state, compilation.split(mesh, batch))
        seen.append(batch)
        metrics.append(jax.device_get(values))
    return Trained(jax.device_get(state), metrics, seen, plan)


def photographs(first, last):
    """Noise with structure, at 32×32, by position."""
    labels = np.arange(first, last) % 10
    rng = [np.random.default_rng(position) for position in range(first, last)]
    noise = np.stack([r.integers(0, 128, (32, 32, 3)) for r in rng])
    return {
        'image': (noise + 12 * labels[:, None, None, None]).astype(np.uint8),
        'label': labels.astype(np.int32),
    }


def train_fp64(config, plan, micro_batches):
    """The training step itself in fp64, where two ways of summing differ by 1e-15 and no more.

    In fp32 they differ by 1e-7, and a ReLU whose input is that close to 0 now and then passes a
    gradient in one of them and not in the other.

    Args:
      config: with dtype='float64'.
      plan: for so many devices, which it trains on.
      micro_batches: whole ones, in order.

    Returns:
      (initial variables, loss of every optimizer step, final variables), all on the host.
    """
    with jax.enable_x64(True):
        task = ImageClassification(config, 10)
        model = model_for(config, plan, task)
        first = jax.tree.map(lambda a: a.astype(np.float64), dict(task.init(jax.random.key(0))))
        mesh = Mesh(np.array(jax.devices()[: plan.num_devices]), (train_lib.AXIS,))
        # Where the step leaves it, or the second one would be compiled again.
        state = train_lib.create_train_state(jax.random.key(0), model=model)
        state = dataclasses.replace(
            state,
            variables=first,
            opt_state=model.optimizer.init(first),
            loss_scale=jax.tree.map(lambda a: a.astype(jax.numpy.float64), state.loss_scale),
        )
        state = jax.device_put(state, NamedSharding(mesh, compilation.REPLICATED))
        step = compilation.lifted(functools.partial(train_lib.train_step, model=model), mesh)
        found = []
        for batch in micro_batches:
            state, metrics = step(state, batch)
            found.append(metrics)
        trained = Trained(jax.device_get(state), found, micro_batches, plan)
        losses = [values['loss'] for values in trained.measured()]
        return jax.device_get(first), losses, trained.state.variables


def differences(a: Any, b: Any) -> dict[str, float]:
    """The relative difference of every array of two trees, max |a - b| / max |a|, by its name."""
    pairs = zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True)
    return {
        jax.tree_util.keystr(path): float(
            np.abs(np.asarray(x, np.float64) - y).max() / (np.abs(x).max() or 1.0)
        )
        for (path, x), y in pairs
    }


def assert_close(a: Any, b: Any, tolerance: float) -> None:
    """Every array of two trees agrees within the relative tolerance."""
    apart = {name: value for name, value in differences(a, b).items() if not value <= tolerance}
    assert not apart, apart


def distance(a: Any, b: Any) -> float:
    """The relative distance of two trees, each taken as one vector: ‖a - b‖ / ‖a‖."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    apart = sum(float(np.square(np.asarray(x, np.float64) - y).sum()) for x, y in pairs)
    return (apart / sum(float(np.square(np.asarray(x, np.float64)).sum()) for x, _ in pairs)) ** 0.5


def is_same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All of a program, those within loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
