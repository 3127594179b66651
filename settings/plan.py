# SPDX-License-Identifier: Apache-2.0
"""Every number that follows from the configuration, the data's size and the devices, once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

from settings.errors import ConfigError
from settings.hyperparameters import Config

# A step is at least a millisecond of work; more than this is a mistake, and would not fit int32
# with its micro-steps.
MOST_STEPS = 10**8


class Dataset(Protocol):
    """A prepared data set, by its metadata alone.

    Attributes:
      name: as in the configuration.
      num_train, num_eval: examples in the two sets.
      digest: of its content; None where it is not known.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def num_train(self) -> int: ...  # noqa: D102
    @property
    def num_eval(self) -> int: ...  # noqa: D102
    @property
    def digest(self) -> str | None: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation of a run, and how the MLPerf log names it.

    Attributes:
      step: it follows so many optimizer steps.
      count: where it stands in the plan's unit, such as the epoch, from 1.
      block_start, block_stop: metadata of the training before it.
      result: metadata of the evaluation itself.
    """

    step: int
    count: int
    block_start: Mapping[str, int]
    block_stop: Mapping[str, int]
    result: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Target:
    """The quality that ends a run.

    Attributes:
      metric: its key in what an evaluation returns.
      words: what people call it.
      value: what has to be met, itself included.
      at_least: whether larger is better.
      largest: that the metric can be; its smallest is 0.
    """

    metric: str
    words: str
    value: float
    at_least: bool = True
    largest: float = math.inf

    def is_met(self, quality: float) -> bool:
        """Whether a quality ends the run; NaN does not."""
        return quality >= self.value if self.at_least else quality <= self.value

    def best(self, qualities: list[float]) -> float:
        """The best of some qualities."""
        return max(qualities) if self.at_least else min(qualities)


@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """What a device can take at a time.

    Attributes:
      multiple_of: it takes a multiple of so many examples.
      field: the configuration's field with that number.
      largest: examples that are taken at most, if the configuration does not say.
    """

    multiple_of: int
    field: str
    largest: int


@dataclasses.dataclass(frozen=True)
class Course:
    """What a workload decides about a run, whatever the devices.

    Attributes:
      evaluations: in order; the last one ends the run.
      target: the quality that ends it before.
      unit: what evaluations are counted in: 'epoch', or what its examples are called.
      examples_per_unit: of one such unit.
      examples: what the examples are called.
      device_batch: what a device can take at a time.
    """

    evaluations: tuple[Evaluation, ...]
    target: Target
    unit: str
    examples_per_unit: int
    examples: str
    device_batch: DeviceBatch


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's arithmetic. B = D·M·k: only `per_device_batch` and `accumulation_steps` change with
    the number of devices; everything that decides what is computed does not.

    Attributes:
      course: what the workload decides.
      num_train, num_eval: examples in the two sets.
      global_batch_size: B, examples per optimizer step.
      num_devices: D.
      per_device_batch: M, examples per device and micro-step.
      accumulation_steps: k, micro-steps per optimizer step.
    """

    course: Course
    num_train: int
    num_eval: int
    global_batch_size: int
    num_devices: int
    per_device_batch: int
    accumulation_steps: int

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """In order; the last one ends the run."""
        return self.course.evaluations

    @property
    def target(self) -> Target:
        """The quality that ends the run."""
        return self.course.target

    @property
    def micro_batch(self) -> int:
        """Examples of one micro-step over all devices, D·M."""
        return self.num_devices * self.per_device_batch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a run that does not meet its target."""
        return self.evaluations[-1].step

    def position(self, step: int) -> float:
        """Training data seen after so many optimizer steps, in the course's unit."""
        return step * self.global_batch_size / self.course.examples_per_unit


def _per_device_batch(config: Config, limits: DeviceBatch, num_devices: int) -> int:
    """The configured per-device batch, or the largest that fits the devices.

    Raises:
      ConfigError: naming the batches that would fit.
    """
    batch, multiple = config.global_batch_size, limits.multiple_of
    quantum = multiple * num_devices
    if batch % quantum:
        near = sorted({max(batch // quantum, 1) * quantum, (batch // quantum + 1) * quantum})
        raise ConfigError(
            f'global_batch_size={batch} is not a multiple of {limits.field} × devices = '
            f'{multiple} × {num_devices} = {quantum}; nearest that are: '
            f'{", ".join(map(str, near))}. To keep the batch, use a number of devices that divides '
            f'global_batch_size / {limits.field} = {batch // multiple}.'
        )
    share = batch // num_devices
    fitting = [m for m in range(multiple, share + 1, multiple) if share % m == 0]
    chosen = config.per_device_batch
    if chosen is None:
        return max(m for m in fitting if m <= max(limits.largest, multiple))
    if chosen not in fitting:
        raise ConfigError(
            f'per_device_batch={chosen} does not fit: global_batch_size = devices × '
            f'per_device_batch × accumulation steps, here {batch} on {num_devices} device(s), in '
            f'multiples of {limits.field}={multiple}; those that fit: '
            f'{", ".join(map(str, fitting))}.'
        )
    return chosen


def make_plan(
    config: Config, course: Course, *, num_train: int, num_eval: int, num_devices: int
) -> Plan:
    """Derives a run's numbers from a resolved configuration.

    Raises:
      ConfigError: when the batch does not fit the devices.
    """
    per_device_batch = _per_device_batch(config, course.device_batch, num_devices)
    return Plan(
        course=course,
        num_train=num_train,
        num_eval=num_eval,
        global_batch_size=config.global_batch_size,
        num_devices=num_devices,
        per_device_batch=per_device_batch,
        accumulation_steps=config.global_batch_size // (num_devices * per_device_batch),
    )
