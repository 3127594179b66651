# SPDX-License-Identifier: Apache-2.0
"""The contract: what a run asks of a benchmark, and all that it knows of one.

A workload is a folder in `workloads/`; nothing here or below names one.
"""

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import optax

import exact_sums
import train_lib
from accumulation import accumulated
from input_pipeline import Pipeline, Share
from settings.errors import ConfigError
from settings.hyperparameters import Config
from settings.plan import Course, Dataset, Plan, make_plan
from train_lib import Model, Task


class Optimizer(NamedTuple):
    """What moves a model's variables, and the learning rate that it uses.

    Attributes:
      transformation: takes {'params': gradient, COLLECTION: the batch's own statistics, …}, both
        averaged over the global batch, and gives what is added to the variables. One for all
        micro-steps: accumulation is not its business.
      schedule: learning rate by optimizer step, from 0.
    """

    transformation: optax.GradientTransformation
    schedule: optax.Schedule


C = TypeVar('C', bound=Config, contravariant=True)
D = TypeVar('D', bound=Dataset)


class Workload(Protocol, Generic[C, D]):
    """A benchmark.

    Attributes:
      head: names of the variables, as the start of their path, that depend on the data set; a run
        that starts from other weights may have them anew.
    """

    head: tuple[str, ...]

    def data(self, config: C) -> D:
        """Finds the prepared data set; reads metadata alone.

        Raises:
          DatasetError: when it is missing or incomplete.
        """

    def check(self, config: C, dataset: D) -> None:
        """Rejects what does not fit together, before anything is written.

        Raises:
          ConfigError: saying what does not fit.
        """

    def course(self, config: C, num_train: int) -> Course:
        """When the run is evaluated, what ends it, and by which rules it is judged.

        Raises:
          ConfigError: when the training set is too small for the configuration.
        """

    def warnings(
        self, base: Mapping[str, Any], overrides: Mapping[str, str], config: C
    ) -> list[str]:
        """What is legal in the configuration and likely a mistake, as sentences.

        Args:
          base: the configuration file's values.
          overrides: texts by name, from flags.
          config: what was made of both.
        """

    def pipeline(self, config: C, dataset: D, seed: int | None, share: Share) -> Pipeline:
        """The batches of a run. No example is read before the first one is asked for.

        Args:
          config: of the run.
          dataset: what `data` has found.
          seed: the run's; None where nothing is trained.
          share: this process's part of a micro-batch.
        """

    def task(self, config: C, dataset: D) -> Task:
        """The model with its loss and metrics."""

    def particulars(self, config: C) -> Mapping[str, str]:
        """What a run says of the model before it compiles, by name: what this machine decides."""

    def optimizer(self, config: C, plan: Plan) -> Optimizer:
        """What moves the model's variables."""


def plan_of(workload: Workload, config: Config, dataset: Dataset, num_devices: int) -> Plan:
    """A run's plan; raises ConfigError as `Workload.course` and `make_plan`."""
    return make_plan(
        config,
        workload.course(config, dataset.num_train),
        num_train=dataset.num_train,
        num_eval=dataset.num_eval,
        num_devices=num_devices,
    )


def check_split(task: Task, num_devices: int) -> None:
    """Rejects a number of devices that a task's variables cannot be split over, by ConfigError."""
    shapes = {name: x.shape for name, x in exact_sums.named(train_lib.abstract_variables(task))}
    for name, dimension in task.split.items():
        if shapes[name][dimension] % num_devices:
            raise ConfigError(
                f'{name} {list(shapes[name])} cannot be split over {num_devices} devices: take a '
                f'number of devices that divides {shapes[name][dimension]}'
            )


def model_of(workload: Workload, config: Config, plan: Plan, dataset: Dataset) -> Model:
    """What a run learns, before anything is compiled; raises ConfigError as `check_split`."""
    task = workload.task(config, dataset)
    check_split(task, plan.num_devices)
    transformation, schedule = workload.optimizer(config, plan)
    optimizer = accumulated(transformation, plan.accumulation_steps, plan.micro_batches, task.split)
    return Model(task, optimizer, schedule, plan.micro_batches)
