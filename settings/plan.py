# SPDX-License-Identifier: Apache-2.0
"""Every number that follows from the configuration, the data's size and the devices, once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

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
class Ruleset:
    """By what a run's log is judged.

    Attributes:
      version: of MLPerf Training's rules.
      facts: that the log must state about the run beside its hyperparameters, by key.
      changes: texts of the official rule files and what stands in their place when the run is
        judged; the verdict says so.
    """

    version: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Course:
    """What a workload decides about a run.

    Attributes:
      evaluations: in order; the last one ends the run.
      target: the quality that ends it before.
      unit: what evaluations are counted in: 'epoch', or what its examples are called.
      examples_per_unit: of one such unit.
      examples: what the examples are called.
      ruleset: by which the run is judged.
      parts: what an example consists of and of how many, if speed is told in these.
      operations: that an example needs, forward and backward, in floating point; None where nobody
        has counted them.
    """

    evaluations: tuple[Evaluation, ...]
    target: Target
    unit: str
    examples_per_unit: int
    examples: str
    ruleset: Ruleset
    parts: tuple[str, int] | None = None
    operations: float | None = None

    @property
    def throughput_unit(self) -> str:
        """What throughput is told in, such as 'tokens/s'."""
        return f'{self.parts[0] if self.parts else self.examples}/s'

    def throughput(self, examples_per_second: float) -> float:
        """A speed in `throughput_unit`."""
        return examples_per_second * (self.parts[1] if self.parts else 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's arithmetic. B = G·D·k: the number of devices D, and with it k, decides how long a run
    takes; what is computed depends on neither.

    Attributes:
      course: what the workload decides.
      num_train, num_eval: examples in the two sets.
      global_batch_size: B, examples per optimizer step.
      micro_batch_size: G, examples that a device computes at a time.
      num_devices: D.
    """

    course: Course
    num_train: int
    num_eval: int
    global_batch_size: int
    micro_batch_size: int
    num_devices: int

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """In order; the last one ends the run."""
        return self.course.evaluations

    @property
    def target(self) -> Target:
        """The quality that ends the run."""
        return self.course.target

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step, D·k."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        """k, micro-steps per optimizer step; in each, every device computes a micro-batch."""
        return self.micro_batches // self.num_devices

    @property
    def micro_step_size(self) -> int:
        """Examples of one micro-step, G·D."""
        return self.micro_batch_size * self.num_devices

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a run that does not meet its target."""
        return self.evaluations[-1].step

    def speed(self, steps_per_second: float, peak: float | None) -> dict[str, float]:
        """How fast a run trains.

        Args:
          steps_per_second: optimizer steps.
          peak: operations a second that a device is made for; None where that is not known.

        Returns:
          'throughput', in the course's `throughput_unit`, and where it is known 'mfu', the part of
          the devices' peak that the operations of the examples are (Chowdhery et al. 2022,
          arXiv:2204.02311, appendix B).
        """
        examples = steps_per_second * self.global_batch_size
        speed = {'throughput': self.course.throughput(examples)}
        if peak and self.course.operations:
            speed['mfu'] = examples * self.course.operations / (self.num_devices * peak)
        return speed

    def position(self, step: int) -> float:
        """Training data seen after so many optimizer steps, in the course's unit."""
        return step * self.global_batch_size / self.course.examples_per_unit


def make_plan(
    config: Config, course: Course, *, num_train: int, num_eval: int, num_devices: int
) -> Plan:
    """Derives a run's numbers from a resolved configuration.

    Raises:
      ConfigError: when the batch does not fit the devices.
    """
    plan = Plan(
        course=course,
        num_train=num_train,
        num_eval=num_eval,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        num_devices=num_devices,
    )
    if plan.micro_batches % num_devices:
        fitting = [d for d in range(1, plan.micro_batches + 1) if plan.micro_batches % d == 0]
        raise ConfigError(
            f'global_batch_size / micro_batch_size = {config.global_batch_size} / '
            f'{config.micro_batch_size} = {plan.micro_batches} micro-batches cannot be spread '
            f'evenly over {num_devices} devices. Use a number of devices that divides them: '
            f'{", ".join(map(str, fitting))}. What a run computes depends on both sizes, so to '
            'change one is to start another run.'
        )
    return plan
