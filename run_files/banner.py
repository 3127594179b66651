# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself before it compiles: one screen of names and values."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from settings.hyperparameters import Config
from settings.plan import Plan

COLUMNS = 80
_NAME_WIDTH = 12


def _row(name: str, value: str) -> list[str]:
    """Lines of a name and its value; a long value takes several."""
    rest = ' ' * _NAME_WIDTH
    return textwrap.wrap(
        value,
        COLUMNS,
        initial_indent=f'{name:{_NAME_WIDTH}}',
        subsequent_indent=rest,
        break_on_hyphens=False,
    )


def lines(
    config: Config,
    plan: Plan,
    digest: str | None,
    variables: Any,
    particulars: Mapping[str, str],
    workdir: Path,
    step: int,
    fingerprint: str,
) -> list[str]:
    """The banner of a run.

    Args:
      config, plan: the run's, with its seed.
      digest: of the data set, where it is known.
      variables: {'params': …} of arrays or their shapes.
      particulars: what else there is to say of the model, by name.
      workdir: the work directory.
      step: of the checkpoint that it resumes from; 0 if it is a new run.
      fingerprint: of that checkpoint; empty if it is a new run.
    """
    devices = jax.devices()
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables['params']))
    position = f'{plan.course.unit} {plan.position(step):.2f}'
    start = f'resumed from step {step} ({position}), fingerprint {fingerprint}'
    rows = {
        'devices': f'{len(devices)} × {devices[0].device_kind}',
        'processes': str(jax.process_count()),
        'batch': f'{plan.global_batch_size} {plan.course.examples} = {plan.num_devices} device(s) '
        f'× {plan.micro_batch_size} × {plan.accumulation_steps} accumulation step(s)',
        'precision': config.dtype,
        'model': f'{config.model}, {parameters:,} parameters',
        **particulars,
        'data set': f'{config.dataset}: {plan.num_train:,} {plan.course.examples} to train, '
        f'{plan.num_eval:,} to evaluate, digest {digest or "not known"}',
        'seed': str(config.seed),
        'directory': str(workdir),
        'start': start if step else 'new run',
    }
    programs = jax.config.values['jax_compilation_cache_dir']
    if programs:
        rows['programs'] = f'kept in {programs}; with them, later starts compile faster'
    return [line for name, value in rows.items() for line in _row(name, value)]
