# SPDX-License-Identifier: Apache-2.0
"""When a run is evaluated, and what ends it."""

from models.llama.architectures import ARCHITECTURES
from settings.errors import ConfigError
from settings.plan import Course, Evaluation, Ruleset, Target
from workloads.llama31_8b.fields import LlamaConfig

# By the names that the log has for them.
PRECISIONS = {'float32': 'fp32', 'bfloat16': 'bfloat16', 'float16': 'fp16'}
# The official rules of the open division have leftovers of another benchmark: they demand a loss
# below 1 nat, and until 5.1.0 that evaluations be counted in epochs, which the closed one forbids.
OPEN_BOUND = "v['value'] < 1.0"
OPEN_COUNT = {'5.1.0': {"\"'epoch_num' in v['metadata']\"": "\"'samples_count' in v['metadata']\""}}


def ruleset(config: LlamaConfig) -> Ruleset:
    """The rules, and what a log must state under 6.1.0.

    Every device computes whole layers, from weights gathered in the dtype of activations.
    """
    precision = PRECISIONS[config.dtype]
    facts = {
        'lowest_numerical_precision_in_linear': precision,
        'lowest_numerical_precision_in_attn': precision,
        'lowest_numerical_precision_in_comm': precision,
        'tensor_parallelism': 1,
        'pipeline_parallelism': 1,
        'context_parallelism': 1,
        'expert_parallelism': 1,
        'micro_batch_size': config.micro_batch_size,
        'config_filename': 'config.json',
    }
    changes = {OPEN_BOUND: f"v['value'] <= {config.target_loss!r}"}
    changes |= OPEN_COUNT.get(config.ruleset, {})
    return Ruleset(config.ruleset, facts, changes if config.division == 'open' else {})


def create(config: LlamaConfig) -> Course:
    """Evaluations by training sequences, which the log calls samples and counts from 0.

    One follows every ceil(`eval_every_samples` / B) steps (MLPerf training rules, table of
    evaluations); the last one is at the last such step within `max_steps`.

    Raises:
      ConfigError: the run would end before its first evaluation.
    """
    batch, length = config.global_batch_size, config.sequence_length
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
        ruleset=ruleset(config),
        parts=('tokens', length),
        operations=length * ARCHITECTURES[config.model].operations(length),
    )
