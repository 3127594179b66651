# SPDX-License-Identifier: Apache-2.0
"""Every number that follows from the configuration, the data's size and the devices, once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from settings.hyperparameters import ACCELERATORS, ConfigError
from settings.rules import is_evaluated

# A step is at least a millisecond of work; more than this is a mistake, and would not fit int32
# with its micro-steps.
MOST_STEPS = 10**8


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation: after `epoch` (from 1), which ends within optimizer step `step` (a count)."""

    epoch: int
    first_epoch: int
    step: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's arithmetic. B = D·M·k: only `per_device_batch` and `accumulation_steps` change with
    the number of devices; everything that decides what is computed does not.

    Attributes:
      num_train, num_eval: examples in the two sets.
      global_batch_size: B, examples per optimizer step.
      num_devices: D.
      per_device_batch: M, examples per device and micro-step; a multiple of bn_span.
      accumulation_steps: k, micro-steps per optimizer step.
      warmup_steps, decay_steps: of the schedule, in optimizer steps.
      evaluations: in order; the last one ends the run.
    """

    num_train: int
    num_eval: int
    global_batch_size: int
    num_devices: int
    per_device_batch: int
    accumulation_steps: int
    warmup_steps: int
    decay_steps: int
    evaluations: tuple[Evaluation, ...]

    @property
    def micro_batch(self) -> int:
        """Examples of one micro-step over all devices, D·M."""
        return self.num_devices * self.per_device_batch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a run that does not meet its target."""
        return self.evaluations[-1].step

    def epoch(self, step: int) -> float:
        """Epochs of training data seen after so many optimizer steps."""
        return step * self.global_batch_size / self.num_train


def _per_device_batch(config: Mapping[str, Any], num_devices: int) -> int:
    """The configured per-device batch, or the largest that fits the devices.

    Raises:
      ConfigError: naming the batches that would fit.
    """
    batch, span = config['global_batch_size'], config['bn_span']
    quantum = span * num_devices
    if batch % quantum:
        near = sorted({max(batch // quantum, 1) * quantum, (batch // quantum + 1) * quantum})
        raise ConfigError(
            f'global_batch_size={batch} is not a multiple of bn_span × devices = {span} × '
            f'{num_devices} = {quantum}; nearest that are: {", ".join(map(str, near))}. '
            'To keep the batch, use a number of devices that divides '
            f'global_batch_size / bn_span = {batch // span}.'
        )
    share = batch // num_devices
    fitting = [m for m in range(span, share + 1, span) if share % m == 0]
    chosen = config['per_device_batch']
    if chosen is None:
        limit = ACCELERATORS[config['accelerator']]
        if span > limit:
            raise ConfigError(
                f'bn_span={span} is more than the {limit} examples that a device of '
                f'accelerator={config["accelerator"]} holds; use a smaller span, another '
                f'accelerator or, to try it all the same, --config.per_device_batch={span}.'
            )
        return max(m for m in fitting if m <= limit)
    if chosen not in fitting:
        raise ConfigError(
            f'per_device_batch={chosen} does not fit: global_batch_size = devices × '
            f'per_device_batch × accumulation steps, here {batch} on {num_devices} device(s), in '
            f'multiples of bn_span={span}; those that fit: {", ".join(map(str, fitting))}.'
        )
    return chosen


def find_evaluations(config: Mapping[str, Any], num_train: int) -> tuple[Evaluation, ...]:
    """The evaluations of a run that does not meet its target, in order.

    The evaluation of epoch e follows step ceil(e·N / B): the mixed batch that holds the epoch's
    last example (MLPerf training rules, section on the training loop).

    Raises:
      ConfigError: when the batch is larger than the training set, or the steps are too many.
    """
    batch = config['global_batch_size']
    if batch > num_train:
        raise ConfigError(
            f'global_batch_size={batch} is larger than the training set of {num_train}; '
            f'use at most {num_train}.'
        )
    epochs = [e for e in range(1, config['max_epochs'] + 1) if is_evaluated(e, config)]
    evaluations = tuple(
        Evaluation(epoch, first_epoch=previous + 1, step=-(-epoch * num_train // batch))
        for previous, epoch in zip([0, *epochs], epochs, strict=False)
    )
    if evaluations[-1].step > MOST_STEPS:
        raise ConfigError(
            f'max_epochs={config["max_epochs"]} at global_batch_size={batch} are '
            f'{evaluations[-1].step:,} steps, more than {MOST_STEPS:,}; use fewer epochs or a '
            'larger batch.'
        )
    return evaluations


def make_plan(
    config: Mapping[str, Any], *, num_train: int, num_eval: int, num_devices: int
) -> Plan:
    """Derives a run's numbers from a resolved configuration.

    The warm-up lasts `warmup_epochs` times the steps of an epoch rounded up. The official code does
    so where it keeps an epoch's last examples, as this program does; by default it drops them and
    rounds down (at a batch of 4096: 313 and 312 steps, a warm-up of 1565 and 1560).

    Raises:
      ConfigError: when the batch does not fit the devices or the training set.
    """
    evaluations = find_evaluations(config, num_train)
    batch = config['global_batch_size']
    per_device_batch = _per_device_batch(config, num_devices)
    return Plan(
        num_train=num_train,
        num_eval=num_eval,
        global_batch_size=batch,
        num_devices=num_devices,
        per_device_batch=per_device_batch,
        accumulation_steps=batch // (num_devices * per_device_batch),
        warmup_steps=round(config['warmup_epochs'] * math.ceil(num_train / batch)),
        decay_steps=config['decay_steps'],
        evaluations=evaluations,
    )
