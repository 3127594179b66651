# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run, once: its name, type, constraint, MLPerf log key and meaning.

A configuration (a mapping from names to values) goes in; out come either every fault that it has,
at once, or a frozen configuration that is known to be good. Validation, flags, log lines and the
README's table all read the one table. This room imports no other.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import FrozenConfigDict

LARGEST_BATCH_WITH_FIXED_MOMENTUM = 32768
# The largest per-device batch of ResNet-50 at 224×224 in fp32 that fits the memory. A hint for
# speed alone: the results do not depend on it.
ACCELERATORS = {'any': 512, 'v100-16gb': 64, 'v100-32gb': 128, 'a100': 256, 'h200': 512}

# What the rules of the closed division leave no choice about, beside the rules of single fields.
CLOSED_DIVISION = {
    'model': 'resnet50',
    'dataset': 'imagenet2012',
    'image_size': 224,
    'augmentation': 'crop_resize',
    'eval_every_epochs': 4,
    'target_top1': 0.759,
    'init_from': None,
}


class ConfigError(ValueError):
    """A configuration that cannot be run; the text lists every fault and what would be right."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A constraint: in words, and as (value, configuration) -> whether it holds.

    `advice`, of the same arguments, is what to say of a value that breaks it.
    """

    words: str
    holds: Callable[[Any, Mapping[str, Any]], bool]
    advice: Callable[[Any, Mapping[str, Any]], str] = lambda value, config: ''


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """One line of the table.

    Attributes:
      name: the field of the configuration and of its flag, `--config.NAME`.
      type: int, float, str or bool. An int is accepted for a float.
      help: what it means, with its unit.
      rule: its constraint.
      log_key: the MLPerf log key, or one per optimizer, or None if the rules log none.
      group: 'benchmark' fields decide what is computed; 'hardware' fields only how fast;
        'run' fields only what is written down about it.
      optional: whether None is a value.
    """

    name: str
    type: type
    help: str
    rule: Rule
    log_key: str | Mapping[str, str] | None = None
    group: str = 'benchmark'
    optional: bool = False


def _one_of(*values) -> Rule:
    return Rule('one of ' + ', '.join(map(str, values)), lambda value, config: value in values)


def _power_of_two_of_1e_4(value: float, config: Mapping[str, Any]) -> bool:
    return value > 0 and abs(math.remainder(math.log2(value / 1e-4), 1)) < 1e-6


def _rate_is_legal(value: float, config: Mapping[str, Any]) -> bool:
    on_grid = abs(math.remainder(value * 1000, 1)) < 1e-6
    return value > 0 and (config.get('optimizer') != 'sgd' or on_grid)


def _momentum_is_legal(value: float, config: Mapping[str, Any]) -> bool:
    large = config.get('global_batch_size', 0) >= LARGEST_BATCH_WITH_FIXED_MOMENTUM
    free = config.get('optimizer') == 'lars' and large
    return 0 < value < 1 if free else value == 0.9


def _decay_steps_are_legal(value: int, config: Mapping[str, Any]) -> bool:
    return value >= (0 if config.get('optimizer') == 'sgd' else 1)


def _warmup_is_legal(value: float, config: Mapping[str, Any]) -> bool:
    return value >= 0 and (config.get('optimizer') != 'sgd' or value == int(value))


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
    others = ', '.join(f'{name}={config.get(name)}' for name in _not_closed(config))
    return f'; with {others} add --config.division=open' if value == 'closed' else ''


def _offset_fits(value: int, config: Mapping[str, Any]) -> bool:
    return 0 <= value < min(4, config.get('eval_every_epochs', 1))


def is_evaluated(epoch: int, config: Mapping[str, Any]) -> bool:
    """Whether the rules evaluate after this epoch (epochs count from 1)."""
    every, offset = config.get('eval_every_epochs', 1), config.get('eval_offset_epochs', 0)
    return epoch > 0 and every > 0 and (epoch - offset) % every == 0


def _nearest_evaluated(value: int, config: Mapping[str, Any]) -> str:
    near = [e for e in range(max(1, value - 8), value + 9) if is_evaluated(e, config)]
    near = sorted(near, key=lambda e: abs(e - value))[:2]
    return f'; nearest that are: {", ".join(map(str, sorted(near)))}'


def _by_optimizer(suffix: str) -> dict[str, str]:
    return {'lars': f'lars_opt_{suffix}', 'sgd': f'sgd_opt_{suffix}'}


_WARMUP_KEYS = {
    'lars': 'lars_opt_learning_rate_warmup_epochs',
    'sgd': 'opt_learning_rate_warmup_epochs',
}
_ANY = Rule('any', lambda value, config: True)
_POSITIVE = Rule('> 0', lambda value, config: value > 0)
_NOT_NEGATIVE = Rule('≥ 0', lambda value, config: value >= 0)
_FRACTION = Rule('in (0, 1)', lambda value, config: 0 < value < 1)
_SEED = Rule('in [0, 2^63)', lambda value, config: 0 <= value < 2**63)
_SPAN = Rule('> 0 and divides global_batch_size', _span_fits)
_RATE = Rule('> 0; for SGD a multiple of 0.001', _rate_is_legal)
_WARMUP = Rule('≥ 0; for SGD an integer', _warmup_is_legal)
_DECAY_STEPS = Rule('> 0; for SGD ≥ 0', _decay_steps_are_legal)
_MOMENTUM = Rule('0.9; for LARS at global_batch_size ≥ 32768 any in (0, 1)', _momentum_is_legal)
_DECAY = Rule('0.0001·2^N, N an integer (…, 5e-05, 0.0001, 0.0002, …)', _power_of_two_of_1e_4)
_OFFSET = Rule('0, 1, 2 or 3, and below eval_every_epochs', _offset_fits)
_EVALUATED = Rule('an epoch that is evaluated', is_evaluated, _nearest_evaluated)
_DEVICE_BATCH = Rule('> 0 and a multiple of bn_span', _device_batch_fits)
_MODELS = _one_of('resnet50', 'resnet18_cifar', 'resnet8_cifar', 'resnet_digits')
_DATASETS = _one_of('digits', 'cifar10', 'imagenet2012')
_AUGMENTATIONS = _one_of('crop_resize', 'pad_crop', 'pad_crop_flip', 'none')
_DTYPES = _one_of('float32', 'bfloat16', 'float16')
_DIVISION = Rule(
    'open; or closed, for which '
    + ', '.join(f'{name}={str(wanted).lower()}' for name, wanted in CLOSED_DIVISION.items()),
    _division_fits,
    _make_it_open,
)
_STATUSES = _one_of('cloud', 'onprem', 'preview', 'research')

# fmt: off
_BENCHMARK = (
    # What is trained, on what.
    ('model', str, 'The network.', _MODELS),
    ('padding', str, "Of stride-2 windows: PyTorch's (exportable), or the official "
     "TensorFlow graph's.", _one_of('symmetric', 'same')),
    ('dataset', str, 'The data set.', _DATASETS),
    ('image_size', int, 'Height and width of an image as the network sees it, pixels.', _POSITIVE),
    ('augmentation', str, 'crop_resize: random area and aspect, resized, flipped; pad_crop: '
     'shifted by up to an eighth of the size; pad_crop_flip: the same, flipped.', _AUGMENTATIONS),
    # The tunable hyperparameters of the benchmark.
    ('global_batch_size', int, 'Examples per optimizer step.', _POSITIVE, 'global_batch_size'),
    ('bn_span', int, 'Examples whose statistics normalise a training example.', _SPAN,
     'model_bn_span'),
    ('optimizer', str, 'The optimizer.', _one_of('lars', 'sgd'), 'opt_name'),
    ('learning_rate', float, 'Base learning rate, reached at the end of the warm-up.', _RATE,
     _by_optimizer('base_learning_rate')),
    ('end_learning_rate', float, 'Learning rate at the end of the decay.', _one_of(0.0001),
     _by_optimizer('end_learning_rate')),
    ('decay_power', int, 'Power of the polynomial decay.', _one_of(2),
     _by_optimizer('learning_rate_decay_poly_power')),
    ('warmup_epochs', float, 'Epochs of linear warm-up.', _WARMUP, _WARMUP_KEYS),
    ('decay_steps', int, 'Optimizer steps of decay, after the warm-up.', _DECAY_STEPS,
     _by_optimizer('learning_rate_decay_steps')),
    ('momentum', float, 'Momentum of the optimizer.', _MOMENTUM, _by_optimizer('momentum')),
    ('weight_decay', float, 'λ: LARS adds λ·w to the gradient, SGD 2·λ·w.', _DECAY,
     _by_optimizer('weight_decay')),
    ('lars_epsilon', float, "Added to the denominator of LARS's trust ratio.", _one_of(0.0),
     {'lars': 'lars_epsilon'}),
    ('label_smoothing', float, 'Probability spread evenly over all classes.', _one_of(0.0, 0.1)),
    # When it is judged, and when it ends.
    ('eval_every_epochs', int, 'Epochs between evaluations.', _POSITIVE),
    ('eval_offset_epochs', int, 'Evaluates after epochs e ≡ offset (mod eval_every_epochs).',
     _OFFSET),
    ('max_epochs', int, 'The run is aborted if it has not met the target by then.', _EVALUATED),
    ('target_top1', float, 'Top-1 accuracy on the evaluation set that ends the run.', _FRACTION),
    ('dtype', str, 'Of activations and convolutions; all else is float32 always.', _DTYPES),
)
_OPTIONAL_BENCHMARK = (
    ('seed', int, "The run's only seed; none: from the system's entropy. Given for debugging and "
     'comparison alone.', _SEED, 'seed'),
    ('init_from', str, 'Checkpoint whose weights the run starts from; none: random ones.', _ANY),
)
_HARDWARE = (
    ('accelerator', str, 'Bounds the automatic per-device batch by its memory.',
     _one_of(*ACCELERATORS)),
    ('data_processes', int, 'Decoding processes per training process; 0: threads alone.',
     _NOT_NEGATIVE),
    ('cache_gib', float, 'Decoded images stay in memory if all of them need at most so many GiB.',
     _NOT_NEGATIVE),
    ('deterministic', bool, 'Bitwise reproducible on a GPU too, at some cost in speed.', _ANY),
)
_OPTIONAL_HARDWARE = (
    ('per_device_batch', int, 'Examples per device and micro-step; none: the largest that fits.',
     _DEVICE_BATCH),
    ('data_threads', int, 'Decoding threads per process; none: one per core.', _POSITIVE),
)
_RUN = (
    ('data_dir', str, 'Folder that holds the prepared data sets.', _ANY),
    ('log_every_steps', int, 'Optimizer steps between two lines of metrics.', _POSITIVE),
    ('drop_page_cache', bool, "Drop the system's page cache first (needs root); the log says "
     'whether it was dropped.', _ANY),
    ('division', str, 'MLPerf division.', _DIVISION, 'submission_division'),
    ('org', str, 'Submitting organisation.', _ANY, 'submission_org'),
    ('platform', str, 'Name of the system.', _ANY, 'submission_platform'),
    ('status', str, 'Availability of the system.', _STATUSES, 'submission_status'),
)
_OPTIONAL_RUN = (
    ('checkpoint_every_steps', int, 'Optimizer steps between checkpoints beside those at '
     'evaluations; none: no others.', _POSITIVE),
)
# fmt: on

TABLE: tuple[Hyperparameter, ...] = tuple(
    dataclasses.replace(Hyperparameter(*row), group=group, optional=optional)
    for rows, group, optional in (
        (_BENCHMARK, 'benchmark', False),
        (_OPTIONAL_BENCHMARK, 'benchmark', True),
        (_HARDWARE, 'hardware', False),
        (_OPTIONAL_HARDWARE, 'hardware', True),
        (_RUN, 'run', False),
        (_OPTIONAL_RUN, 'run', True),
    )
    for row in rows
)
BY_NAME = {entry.name: entry for entry in TABLE}


def parse(name: str, text: str) -> Any:
    """The value of a flag's text: 'none' where optional, 'true'/'false' for a bool.

    Raises:
      ValueError: when the text is no value of the field's type.
    """
    entry = BY_NAME[name]
    if entry.optional and text.lower() == 'none':
        return None
    if entry.type is bool:
        return ('false', 'true').index(text.lower()) == 1
    return entry.type(text)


def _has_type(entry: Hyperparameter, value: Any) -> bool:
    if value is None:
        return entry.optional
    if entry.type is float:
        finite = isinstance(value, int | float) and math.isfinite(value)
        return finite and not isinstance(value, bool)
    return isinstance(value, entry.type) and (entry.type is bool or not isinstance(value, bool))


def _fault_of(entry: Hyperparameter, value: Any, config: Mapping[str, Any]) -> str | None:
    if not _has_type(entry, value):
        orelse = ' or none' if entry.optional else ''
        return f'{entry.name}={value!r} is not of type {entry.type.__name__}{orelse}'
    try:
        if value is None or entry.rule.holds(value, config):
            return None
    except TypeError:  # The rule reads another field, whose own type is at fault and reported.
        return None
    advice = entry.rule.advice(value, config)
    return f'{entry.name}={value!r} breaks the rule: {entry.rule.words}{advice}'


def unknown_name(name: str) -> str:
    """The fault of a field that is not in the table, with the closest that is."""
    close = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.5)
    return f'{name} is no hyperparameter' + (f'; did you mean {close[0]}?' if close else '')


def resolve(base: Mapping[str, Any], overrides: Mapping[str, str]) -> FrozenConfigDict:
    """Judges a configuration whole.

    Args:
      base: values by name, from a configuration file.
      overrides: texts by name, from flags; they win.

    Raises:
      ConfigError: listing every fault, each with field, value and rule.
    """
    faults = [unknown_name(name) for name in (*base, *overrides) if name not in BY_NAME]
    values = {name: value for name, value in base.items() if name in BY_NAME}
    for name, text in overrides.items():
        if name not in BY_NAME:
            continue
        try:
            values[name] = parse(name, text)
        except ValueError:
            faults.append(f'{name}={text!r} is not of type {BY_NAME[name].type.__name__}')
            values.pop(name, None)
    broken = {fault.split('=', 1)[0] for fault in faults}
    for entry in TABLE:
        if entry.name in values:
            fault = _fault_of(entry, values[entry.name], values)
            faults += [fault] if fault else []
        elif entry.name not in broken:
            faults.append(f'{entry.name} is missing')
    if faults:
        raise ConfigError('The configuration has faults:\n  ' + '\n  '.join(faults))
    return FrozenConfigDict({entry.name: values[entry.name] for entry in TABLE})


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Fields that decide what is computed and have other values in another configuration."""
    return [
        f'{entry.name}: {theirs.get(entry.name)!r} there, {ours[entry.name]!r} here'
        for entry in TABLE
        if entry.group == 'benchmark' and ours[entry.name] != theirs.get(entry.name)
    ]


def logged(config: Mapping[str, Any]) -> dict[str, Any]:
    """The table's MLPerf log lines, value by key, for the optimizer in use."""
    lines = {}
    for entry in TABLE:
        key = entry.log_key
        if isinstance(key, Mapping):
            key = key.get(config['optimizer'])
        if key:
            lines[key] = config[entry.name]
    return lines
