# SPDX-License-Identifier: Apache-2.0
"""The configuration of Llama 3.1 8B: its fields, and MLPerf's rules for them. Imports no JAX."""

import dataclasses

from models.llama.architectures import ARCHITECTURES
from settings.hyperparameters import Config, field
from settings.rules import BOOLEAN, POSITIVE, Rule, division, one_of
from workloads.llama31_8b.datasets import FILES

LONGEST_SEQUENCE = 131_072  # Llama 3.1's own limit.
PART_OF_A_SEQUENCE = 128  # The loss is computed by chunks of some of these.
LARGEST_RATE = 1.0
END_PART = 0.1  # Of the base learning rate, where the decay ends.

# What the rules of the closed division leave no choice about, beside the rules of single fields
# (MLPerf training rules, table of hyperparameters, and the compliance checker of ruleset 6.1.0).
CLOSED_DIVISION = {
    'model': 'llama31_8b',
    'dataset': 'c4',
    'sequence_length': 8192,
    'max_steps': 1_200_000,
    'eval_every_samples': 12_288,
    'eval_samples': 1024,
    'target_loss': 3.3,
    'decay_norms': False,
    'init_from': None,
    'seed': None,
}


def _is_end_rate(value: float, base: float) -> bool:
    return abs(value - END_PART * base) <= 1e-9 * base


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    """The fields of a run of Llama."""

    # What is trained, on what.
    benchmark: str = field(one_of('llama31_8b'), 'The benchmark, by the name that MLPerf gives it.')
    model: str = field(one_of(*ARCHITECTURES), 'The network.')
    dataset: str = field(one_of(*FILES), 'The data set.')
    sequence_length: int = field(
        Rule(
            f'a multiple of {PART_OF_A_SEQUENCE} and ≤ {LONGEST_SEQUENCE}',
            lambda value: 0 < value <= LONGEST_SEQUENCE and value % PART_OF_A_SEQUENCE == 0,
        ),
        'Tokens per sequence.',
        log_key='max_sequence_length',
    )

    # The tunable hyperparameters of the benchmark.
    optimizer: str = field(one_of('adamw'), 'The optimizer.', log_key='opt_name')
    learning_rate: float = field(
        Rule(f'> 0 and ≤ {LARGEST_RATE:g}', lambda value: 0 < value <= LARGEST_RATE),
        'Base learning rate, reached at the end of the warm-up.',
        log_key='opt_base_learning_rate',
        fits='global_batch_size',
    )
    end_learning_rate: float = field(
        Rule(
            f'{END_PART:g} · learning_rate',
            _is_end_rate,
            ('learning_rate',),
            lambda value, base: f', {END_PART * base:g}',
        ),
        'Learning rate at the end of the decay.',
        log_key='opt_end_learning_rate',
        fits='learning_rate',
    )
    warmup_steps: int = field(
        Rule('≥ 0 and < max_steps', lambda value, last: 0 <= value < last, ('max_steps',)),
        'Optimizer steps of linear warm-up.',
        log_key='opt_learning_rate_warmup_steps',
        fits='global_batch_size',
    )
    decay_steps: int = field(
        Rule(
            'max_steps − warmup_steps',
            lambda value, last, warmup: value == last - warmup,
            ('max_steps', 'warmup_steps'),
            lambda value, last, warmup: f', {last - warmup}',
        ),
        'Optimizer steps of decay, after the warm-up.',
        log_key='opt_learning_rate_decay_steps',
        fits='warmup_steps',
    )
    decay_schedule: str = field(
        one_of('cosine with linear warmup'),
        'Course of the learning rate.',
        log_key='opt_learning_rate_decay_schedule',
    )
    beta_1: float = field(
        one_of(0.9), 'AdamW: decay rate of the first moment.', log_key='opt_adamw_beta_1'
    )
    beta_2: float = field(
        one_of(0.95), 'AdamW: decay rate of the second moment.', log_key='opt_adamw_beta_2'
    )
    epsilon: float = field(
        one_of(1e-5),
        'AdamW: added to the square root of the second moment.',
        log_key='opt_adamw_epsilon',
    )
    weight_decay: float = field(
        one_of(0.1),
        'AdamW: decoupled weight decay λ, scaled by the learning rate.',
        log_key='opt_adamw_weight_decay',
    )
    decay_norms: bool = field(
        BOOLEAN,
        'Apply weight decay to norm weights too, as NeMo 2.1.0 does; otherwise to matrices only.',
    )
    gradient_clip_norm: float = field(
        one_of(1.0), "Largest norm of a step's gradient.", log_key='opt_gradient_clip_norm'
    )

    # When it is evaluated, and when it ends.
    max_steps: int = field(
        POSITIVE,
        'The run is aborted if it has not met the target by then; the decay ends there.',
        log_key='max_steps',
    )
    eval_every_samples: int = field(
        POSITIVE,
        'Training sequences between evaluations, rounded up to a multiple of the batch.',
    )
    eval_samples: int = field(
        POSITIVE, 'Sequences that are evaluated, the first of the validation file.'
    )
    target_loss: float = field(
        Rule('> 0', lambda value: value > 0),
        'Mean loss on the evaluated sequences, in nats a token, that ends the run.',
    )
    ruleset: str = field(
        one_of('6.1.0', '6.0.0', '5.1.0'),
        'MLPerf Training ruleset by which the log is judged.',
        group='run',
    )
    division: str = field(
        division(CLOSED_DIVISION), 'MLPerf division.', log_key='submission_division', group='run'
    )
