# SPDX-License-Identifier: Apache-2.0
"""The configuration of ResNet: its fields, and MLPerf's rules for them. Imports no JAX."""

import dataclasses
import functools
import math

from models.resnet.architectures import ARCHITECTURES
from settings.hyperparameters import Config, field
from settings.rules import (
    BOOLEAN,
    FRACTION,
    INT32_LIMIT,
    NOT_NEGATIVE,
    Rule,
    at_most,
    divides,
    division,
    one_of,
)
from workloads.resnet.datasets import EVAL_SPLIT

SMALLEST_BATCH_WITH_FREE_MOMENTUM = 32768
MOST_EPOCHS = 10_000  # So that counts of steps and examples fit int32.
LARGEST_IMAGE = 2048
LARGEST_RATE = 1e6
LARGEST_DECAY_EXPONENT = 100  # 0.0001·2^±100 are normal numbers in fp32.

# What the rules of the closed division leave no choice about, beside the rules of single fields.
CLOSED_DIVISION = {
    'model': 'resnet50',
    'dataset': 'imagenet2012',
    'image_size': 224,
    'augmentation': 'crop_resize',
    'eval_every_epochs': 4,
    'target_top1': 0.759,
    'init_from': None,
    'seed': None,
}


def _is_decay(value: float) -> bool:
    if value <= 0:
        return False
    exponent = math.log2(value) - math.log2(1e-4)
    integer = abs(math.remainder(exponent, 1)) < 1e-6
    return integer and abs(round(exponent)) <= LARGEST_DECAY_EXPONENT


def _is_rate(value: float, optimizer: str) -> bool:
    if not 0 < value <= LARGEST_RATE:
        return False
    return optimizer != 'sgd' or (value > 5e-4 and abs(math.remainder(value * 1000, 1)) < 1e-6)


def _is_momentum(value: float, batch: int, optimizer: str) -> bool:
    free = optimizer == 'lars' and batch >= SMALLEST_BATCH_WITH_FREE_MOMENTUM
    return 0 < value < 1 if free else value == 0.9


def is_evaluated(epoch: int, every: int, offset: int) -> bool:
    """Whether the rules evaluate after this epoch (epochs count from 1)."""
    return epoch > 0 and every > 0 and (epoch - offset) % every == 0


def _is_last_epoch(value: int, every: int, offset: int) -> bool:
    return value <= MOST_EPOCHS and is_evaluated(value, every, offset)


def _nearest_evaluated(value: int, every: int, offset: int) -> str:
    last = min(value, MOST_EPOCHS)
    below = last - (last - offset) % max(every, 1)
    near = [e for e in (below, below + every) if _is_last_epoch(e, every, offset)]
    fields = f'eval_every_epochs={every}, eval_offset_epochs={offset}'
    return f'; nearest that are: {", ".join(map(str, near)) or "none"} ({fields})'


def _by_optimizer(suffix: str) -> dict[str, str]:
    return {'lars': f'lars_opt_{suffix}', 'sgd': f'sgd_opt_{suffix}'}


_hardware = functools.partial(field, group='hardware')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig(Config):
    """The fields of a run of ResNet."""

    # What is trained, on what.
    benchmark: str = field(one_of('resnet'), 'The benchmark, by the name that MLPerf gives it.')
    model: str = field(one_of(*ARCHITECTURES), 'The network.')
    dataset: str = field(one_of(*EVAL_SPLIT), 'The data set.')
    padding: str = field(
        one_of('symmetric', 'same'),
        "Of stride-2 windows: PyTorch's (exportable), or the official TensorFlow graph's.",
    )
    truncated_init: bool = field(
        BOOLEAN,
        'Convolutions start from a truncated normal distribution, else from a normal one.',
    )
    image_size: int = field(
        at_most(LARGEST_IMAGE), 'Height and width of an image as the network sees it, pixels.'
    )
    augmentation: str = field(
        one_of('crop_resize', 'pad_crop', 'pad_crop_flip', 'none'),
        'crop_resize: random area and aspect, resized, flipped; pad_crop: shifted by up to an '
        'eighth of the size; pad_crop_flip: the same, flipped.',
    )

    # The tunable hyperparameters of the benchmark.
    bn_span: int = field(
        divides('micro_batch_size'),
        'Examples whose statistics normalise a training example.',
        log_key='model_bn_span',
    )
    optimizer: str = field(one_of('lars', 'sgd'), 'The optimizer.', log_key='opt_name')
    learning_rate: float = field(
        Rule(f'> 0 and ≤ {LARGEST_RATE:g}; for SGD a multiple of 0.001', _is_rate, ('optimizer',)),
        'Base learning rate, reached at the end of the warm-up.',
        log_key=_by_optimizer('base_learning_rate'),
        fits='optimizer',
    )
    end_learning_rate: float = field(
        one_of(0.0001),
        'Learning rate at the end of the decay.',
        log_key=_by_optimizer('end_learning_rate'),
    )
    decay_power: int = field(
        one_of(2),
        'Power of the polynomial decay.',
        log_key=_by_optimizer('learning_rate_decay_poly_power'),
    )
    warmup_epochs: float = field(
        Rule(
            f'≥ 0 and ≤ {MOST_EPOCHS}; for SGD an integer',
            lambda value, optimizer: (
                0 <= value <= MOST_EPOCHS and (optimizer != 'sgd' or value == int(value))
            ),
            ('optimizer',),
        ),
        'Epochs of linear warm-up.',
        log_key={
            'lars': 'lars_opt_learning_rate_warmup_epochs',
            'sgd': 'opt_learning_rate_warmup_epochs',
        },
    )
    decay_steps: int = field(
        Rule(
            '> 0 and < 2^31; for SGD ≥ 0',
            lambda value, optimizer: (0 if optimizer == 'sgd' else 1) <= value < INT32_LIMIT,
            ('optimizer',),
        ),
        'Optimizer steps of decay, after the warm-up.',
        log_key=_by_optimizer('learning_rate_decay_steps'),
    )
    momentum: float = field(
        Rule(
            f'0.9; for LARS at global_batch_size ≥ {SMALLEST_BATCH_WITH_FREE_MOMENTUM} any in '
            '(0, 1)',
            _is_momentum,
            ('global_batch_size', 'optimizer'),
        ),
        'Momentum of the optimizer.',
        log_key=_by_optimizer('momentum'),
    )
    weight_decay: float = field(
        Rule(
            f'0.0001·2^N, N an integer in ±{LARGEST_DECAY_EXPONENT} (…, 5e-05, 0.0001, 0.0002, …)',
            _is_decay,
        ),
        'λ: LARS adds λ·w to the gradient, SGD 2·λ·w.',
        log_key=_by_optimizer('weight_decay'),
    )
    lars_epsilon: float = field(
        one_of(0.0),
        "Added to the denominator of LARS's trust ratio.",
        log_key={'lars': 'lars_epsilon'},
    )
    label_smoothing: float = field(one_of(0.0, 0.1), 'Probability spread evenly over all classes.')

    # When it is evaluated, and when it ends.
    eval_every_epochs: int = field(at_most(MOST_EPOCHS), 'Epochs between evaluations.')
    eval_offset_epochs: int = field(
        Rule(
            '0, 1, 2 or 3, and below eval_every_epochs',
            lambda value, every: 0 <= value < min(4, every),
            ('eval_every_epochs',),
        ),
        'Evaluates after epochs e ≡ offset (mod eval_every_epochs).',
    )
    max_epochs: int = field(
        Rule(
            f'at most {MOST_EPOCHS} and an epoch that is evaluated',
            _is_last_epoch,
            ('eval_every_epochs', 'eval_offset_epochs'),
            _nearest_evaluated,
        ),
        'The run is aborted if it has not met the target by then.',
    )
    target_top1: float = field(FRACTION, 'Top-1 accuracy on the evaluation set that ends the run.')

    cache_gib: float = _hardware(
        NOT_NEGATIVE,
        "Keep a split's decoded images in the memory of each process that reads them if they need "
        'at most this many GiB.',
    )

    division: str = field(
        division(CLOSED_DIVISION), 'MLPerf division.', log_key='submission_division', group='run'
    )
