# SPDX-License-Identifier: Apache-2.0
"""When a run is evaluated, and what ends it."""

from settings.errors import ConfigError
from settings.plan import Course, Evaluation, Target
from workloads.llama31_8b.fields import LlamaConfig


def create(config: LlamaConfig) -> Course:
    """Evaluations by training sequences, which the log calls samples and counts from 0.

    One follows every ceil(`eval_every_samples` / B) steps (MLPerf training rules, table of
    evaluations); the last one is at the last such step within `max_steps`.

    Raises:
      ConfigError: the run would end before its first evaluation.
    """
    batch = config.global_batch_size
    every = -(-config.eval_every_samples // batch)
    if every > config.max_steps:
        raise ConfigError(
            f'max_steps={config.max_steps} end before the first evaluation, after step {every}; '
            'use more, or a smaller eval_every_samples'
        )

    def evaluation(step: int) -> Evaluation:
        after = {'samples_count': step * batch}
        before = {'samples_count': (step - every) * batch}
        return Evaluation(step, step * batch, before, after, after)

    return Course(
        evaluations=tuple(map(evaluation, range(every, config.max_steps + 1, every))),
        target=Target('eval_loss', 'loss', config.target_loss, at_least=False),
        unit='sequences',
        examples_per_unit=1,
        examples='sequences',
    )
