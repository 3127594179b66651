# SPDX-License-Identifier: Apache-2.0
"""What the steps of `train_lib` have added up, read on the host: every average is rounded once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import exact_sums
from accumulation import metric_format
from train_lib import EVALUATED, Variables


def rejected_names(variables: Variables, rejected: Any) -> list[str]:
    """What was not finite or out of range, from `TrainState.rejected` on the host, in words."""
    *numbers, of_metrics = rejected.tolist()
    words = ['a metric'] if of_metrics else []
    for (kind, collection), number in zip(sorted(variables.items()), numbers, strict=True):
        if number:
            name, _ = exact_sums.named(collection)[number - 1]
            words.append(f'gradient of {name}' if kind == 'params' else f'{kind} {name}')
    return words


def measured(micro_steps: Sequence[Mapping[str, Any]], micro_batches: int) -> dict[str, float]:
    """The metrics of an optimizer step, from those of its micro-steps, on the host.

    Returns:
      By name the task's, averaged over the batch and rounded once; 'largest_gradient', the largest
      element of a micro-batch's gradient in magnitude; 'learning_rate', and the 'loss_scale' of the
      next step.
    """
    *_, last = micro_steps
    sums = jax.tree.map(lambda *parts: sum(map(int, parts)), *(m['sums'] for m in micro_steps))
    form = metric_format(micro_batches)
    return {name: form.value(total, micro_batches) for name, total in sums.items()} | {
        'largest_gradient': max(float(m['largest_gradient']) for m in micro_steps),
        'learning_rate': float(last['learning_rate']),
        'loss_scale': float(last['loss_scale']),
    }


def evaluated(batches: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """The sums over an evaluation set, from those that `eval_step` gave, on the host.

    Returns:
      By name integers, and numbers that were rounded once; NaN where one was NaN or out of range.
    """
    totals = jax.tree.map(lambda *parts: sum(map(int, parts)), *batches)
    amounts = {
        name: math.nan if totals['rejected'][name] else EVALUATED.value(total)
        for name, total in totals['amounts'].items()
    }
    return totals['counts'] | amounts
