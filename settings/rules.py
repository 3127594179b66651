# SPDX-License-Identifier: Apache-2.0
"""The constraints on hyperparameters: MLPerf's training rules, and what makes sense.

A constraint is judged with the whole configuration at hand, for some depend on other fields.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

SMALLEST_BATCH_WITH_FREE_MOMENTUM = 32768
# Counts of steps and examples are int32 on the device; epochs are bounded so that they fit.
INT32_LIMIT = 2**31
MOST_EPOCHS = 10_000
MOST_WORKERS = 1024
LARGEST_IMAGE = 2048
LARGEST_RATE = 1e6
LARGEST_DECAY_EXPONENT = 100  # 0.0001·2^±100 are normal numbers in fp32.

# What the rules of the closed division leave no choice about, beside the rules of single fields.
# A seed may come from the system's entropy only.
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


@dataclasses.dataclass(frozen=True)
class Rule:
    """A constraint: in words, and as (value, configuration) -> whether it holds.

    `advice`, of the same arguments, is what to say of a value that breaks it.
    """

    words: str
    holds: Callable[[Any, Mapping[str, Any]], bool]
    advice: Callable[[Any, Mapping[str, Any]], str] = lambda value, config: ''


def one_of(*values: Any) -> Rule:
    """The value is among these."""
    return Rule('one of ' + ', '.join(map(str, values)), lambda value, config: value in values)


def at_most(limit: int) -> Rule:
    """A positive integer up to a limit."""
    return Rule(f'> 0 and ≤ {limit}', lambda value, config: 0 < value <= limit)


def _power_of_two_of_1e_4(value: float, config: Mapping[str, Any]) -> bool:
    if value <= 0:
        return False
    exponent = math.log2(value) - math.log2(1e-4)
    integer = abs(math.remainder(exponent, 1)) < 1e-6
    return integer and abs(round(exponent)) <= LARGEST_DECAY_EXPONENT


def _rate_is_legal(value: float, config: Mapping[str, Any]) -> bool:
    if not 0 < value <= LARGEST_RATE:
        return False
    on_grid = value > 5e-4 and abs(math.remainder(value * 1000, 1)) < 1e-6
    return config.get('optimizer') != 'sgd' or on_grid


def _momentum_is_legal(value: float, config: Mapping[str, Any]) -> bool:
    large = config.get('global_batch_size', 0) >= SMALLEST_BATCH_WITH_FREE_MOMENTUM
    free = config.get('optimizer') == 'lars' and large
    return 0 < value < 1 if free else value == 0.9


def _decay_steps_are_legal(value: int, config: Mapping[str, Any]) -> bool:
    return (0 if config.get('optimizer') == 'sgd' else 1) <= value < INT32_LIMIT


def _warmup_is_legal(value: float, config: Mapping[str, Any]) -> bool:
    return 0 <= value <= MOST_EPOCHS and (config.get('optimizer') != 'sgd' or value == int(value))


def _span_fits(value: int, config: Mapping[str, Any]) -> bool:
    return value > 0 and config.get('global_batch_size', 0) % value == 0


def _device_batch_fits(value: int, config: Mapping[str, Any]) -> bool:
    span = config.get('bn_span', 1)
    return value > 0 and span > 0 and value % span == 0


def _not_closed(config: Mapping[str, Any]) -> list[str]:
    return [name for name, wanted in CLOSED_DIVISION.items() if config.get(name) != wanted]


def _division_fits(value: str, config: Mapping[str, Any]) -> bool:
    return value == 'open' or (value == 'closed' and not _not_closed(config))


def _make_it_open(value: str, config: Mapping[str, Any]) -> str:
    if value != 'closed':
        return ''
    others = {name: config.get(name) for name in _not_closed(config)}
    words = ', '.join(f'{name}={other}' for name, other in others.items())
    advice = f'; with {words} add --config.division=open'
    if 'seed' in others:
        advice += ', or --config.seed=none, with which a run that resumes keeps its own'
    return advice


def _offset_fits(value: int, config: Mapping[str, Any]) -> bool:
    return 0 <= value < min(4, config.get('eval_every_epochs', 1))


def _is_last_epoch(value: int, config: Mapping[str, Any]) -> bool:
    return value <= MOST_EPOCHS and is_evaluated(value, config)


def _is_text(value: str, config: Mapping[str, Any]) -> bool:
    return bool(value.strip()) and value.isprintable()


def _is_path(value: str, config: Mapping[str, Any]) -> bool:
    return bool(value) and '\0' not in value


def is_evaluated(epoch: int, config: Mapping[str, Any]) -> bool:
    """Whether the rules evaluate after this epoch (epochs count from 1)."""
    every, offset = config.get('eval_every_epochs', 1), config.get('eval_offset_epochs', 0)
    return epoch > 0 and every > 0 and (epoch - offset) % every == 0


def _nearest_evaluated(value: int, config: Mapping[str, Any]) -> str:
    every, offset = config.get('eval_every_epochs', 1), config.get('eval_offset_epochs', 0)
    below = min(value, MOST_EPOCHS) - (min(value, MOST_EPOCHS) - offset) % every
    near = [e for e in (below, below + every) if _is_last_epoch(e, config)]
    fields = f'eval_every_epochs={every}, eval_offset_epochs={offset}'
    return f'; nearest that are: {", ".join(map(str, near)) or "none"} ({fields})'


BOOLEAN = Rule('true or false', lambda value, config: True)
POSITIVE = Rule('> 0 and < 2^31', lambda value, config: 0 < value < INT32_LIMIT)
EPOCHS = at_most(MOST_EPOCHS)
WORKERS = at_most(MOST_WORKERS)
WORKERS_OR_NONE = Rule(
    f'≥ 0 and ≤ {MOST_WORKERS}', lambda value, config: 0 <= value <= MOST_WORKERS
)
IMAGE_SIZE = at_most(LARGEST_IMAGE)
NOT_NEGATIVE = Rule('≥ 0', lambda value, config: value >= 0)
TEXT = Rule('not empty, on one line', _is_text)
PATH = Rule('a path', _is_path)
FRACTION = Rule('in (0, 1)', lambda value, config: 0 < value < 1)
SEED = Rule('in [0, 2^63)', lambda value, config: 0 <= value < 2**63)
SPAN = Rule(
    '> 0 and divides global_batch_size',
    _span_fits,
    lambda value, config: f' (global_batch_size={config.get("global_batch_size")})',
)
RATE = Rule(f'> 0 and ≤ {LARGEST_RATE:g}; for SGD a multiple of 0.001', _rate_is_legal)
WARMUP = Rule(f'≥ 0 and ≤ {MOST_EPOCHS}; for SGD an integer', _warmup_is_legal)
DECAY_STEPS = Rule('> 0 and < 2^31; for SGD ≥ 0', _decay_steps_are_legal)
MOMENTUM = Rule('0.9; for LARS at global_batch_size ≥ 32768 any in (0, 1)', _momentum_is_legal)
DECAY = Rule(
    f'0.0001·2^N, N an integer in ±{LARGEST_DECAY_EXPONENT} (…, 5e-05, 0.0001, 0.0002, …)',
    _power_of_two_of_1e_4,
)
OFFSET = Rule('0, 1, 2 or 3, and below eval_every_epochs', _offset_fits)
EVALUATED = Rule(
    f'at most {MOST_EPOCHS} and an epoch that is evaluated', _is_last_epoch, _nearest_evaluated
)
DEVICE_BATCH = Rule('> 0 and a multiple of bn_span', _device_batch_fits)
MODELS = one_of('resnet50', 'resnet18_cifar', 'resnet8_cifar', 'resnet_digits')
DATASETS = one_of('digits', 'cifar10', 'imagenet2012')
AUGMENTATIONS = one_of('crop_resize', 'pad_crop', 'pad_crop_flip', 'none')
DTYPES = one_of('float32', 'bfloat16', 'float16')
DIVISION = Rule(
    'open; or closed, for which '
    + ', '.join(f'{name}={str(wanted).lower()}' for name, wanted in CLOSED_DIVISION.items()),
    _division_fits,
    _make_it_open,
)
STATUSES = one_of('cloud', 'onprem', 'preview', 'research')
