# SPDX-License-Identifier: Apache-2.0
"""The benchmarks by name. A further one is a folder beside this file and a line in `BENCHMARKS`."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from settings.errors import ConfigError
from settings.hyperparameters import Config, resolve
from workloads.llama31_8b.fields import LlamaConfig
from workloads.resnet.fields import ResNetConfig

if TYPE_CHECKING:
    from training.workload import Workload


class Entry(NamedTuple):
    """A benchmark: the type of its configuration, and the module that has its `WORKLOAD`."""

    config_type: type[Config]
    module: str


BENCHMARKS = {
    'resnet': Entry(ResNetConfig, 'workloads.resnet.workload'),
    'llama31_8b': Entry(LlamaConfig, 'workloads.llama31_8b.workload'),
}


def config_type(values: Mapping[str, Any]) -> type[Config]:
    """The type of the configuration that some values belong to, by their field `benchmark`.

    Raises:
      ConfigError: when they name no benchmark that is here.
    """
    name = values.get('benchmark')
    if not isinstance(name, str) or name not in BENCHMARKS:
        given = 'is missing' if name is None else f'is {name!r:.200}'
        raise ConfigError(f'benchmark {given}; it is one of: {", ".join(BENCHMARKS)}')
    return BENCHMARKS[name].config_type


def configure(base: Mapping[str, Any], overrides: Mapping[str, str]) -> Config:
    """`hyperparameters.resolve` for the benchmark that `base` names."""
    return resolve(config_type(base), base, overrides)


def load(name: str) -> 'Workload':
    """A benchmark's workload; imports its code, and JAX with it."""
    return importlib.import_module(BENCHMARKS[name].module).WORKLOAD
