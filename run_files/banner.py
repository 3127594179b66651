# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself before it compiles: one screen of names and values."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from settings.plan import Plan
from workloads.resnet.records import Dataset

COLUMNS = 80
_NAME_WIDTH = 12


def _row(name: str, value: str) -> list[str]:
    """Lines of a name and its value; a long value goes on below itself."""
    rest = ' ' * _NAME_WIDTH
    return textwrap.wrap(
        value,
        COLUMNS,
        initial_indent=f'{name:{_NAME_WIDTH}}',
        subsequent_indent=rest,
        break_on_hyphens=False,
    )


def lines(
    config: Mapping[str, Any],
    plan: Plan,
    dataset: Dataset,
    variables: Any,
    workdir: Path,
    step: int,
) -> list[str]:
    """The banner of a run.

    Args:
      config, plan, dataset: the run's, with its seed.
      variables: {'params': …} of arrays or their shapes.
      workdir: the work directory.
      step: of the checkpoint that it resumes from; 0 if it is a new run.
    """
    devices = jax.devices()
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables['params']))
    seen = plan.epoch(step)
    rows = {
        'devices': f'{len(devices)} × {devices[0].device_kind}',
        'processes': str(jax.process_count()),
        'batch': f'{plan.global_batch_size} = {plan.num_devices} device(s) × '
        f'{plan.per_device_batch} examples × {plan.accumulation_steps} accumulation step(s)',
        'precision': config['dtype'],
        'model': f'{config["model"]}, {parameters:,} parameters',
        'data set': f'{dataset.name}: {dataset.num_train:,} examples to train, '
        f'{dataset.num_eval:,} to evaluate, digest {dataset.digest or "not known"}',
        'seed': str(config['seed']),
        'directory': str(workdir),
        'start': f'resumed from step {step} (epoch {seen:.2f})' if step else 'new run',
    }
    programs = jax.config.values['jax_compilation_cache_dir']
    if programs:
        rows['programs'] = f'kept in {programs}; with them, later starts compile faster'
    return [line for name, value in rows.items() for line in _row(name, value)]
