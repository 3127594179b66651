# SPDX-License-Identifier: Apache-2.0
"""The training step of a configuration with other fields, on data or without any."""

from typing import Any, NamedTuple

from settings import hyperparameters, loading
from settings.plan import Plan
from train_lib import Model
from training.workload import model_of, plan_of
from workloads.resnet.fields import ResNetConfig
from workloads.resnet.records import Dataset, find_dataset
from workloads.resnet.workload import WORKLOAD


class Case(NamedTuple):
    """What `train_loop.set_up` takes after the workload."""

    config: ResNetConfig
    plan: Plan
    dataset: Dataset
    model: Model


def prepare(
    file: str, num_devices: int, *, classes: int = 1000, data_dir: str | None = None, **fields: Any
) -> Case:
    """Resolves a configuration; without `data_dir` for a data set of ImageNet's size.

    Raises:
      ConfigError: when the fields do not fit.
      DatasetError: when `data_dir` has no such data set.
    """
    fields = {'division': 'open', 'seed': 1, **fields}
    texts = {name: str(value) for name, value in fields.items()}
    config = hyperparameters.resolve(ResNetConfig, loading.load(file), texts)
    if data_dir:
        dataset = find_dataset(config.dataset, data_dir)
    else:
        sizes = (1_281_167, 50_000, classes)
        dataset = Dataset(config.dataset, '', *sizes, digest=None, image_size=config.image_size)
    plan = plan_of(WORKLOAD, config, dataset, num_devices)
    return Case(config, plan, dataset, model_of(WORKLOAD, config, plan, dataset))
