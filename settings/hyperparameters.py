# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run, once: its name, type, constraint, MLPerf log key and meaning.

A configuration (a mapping from names to values) goes in; out come either every fault that it has,
at once, or a frozen configuration that is known to be good. Validation, flags, log lines and the
README's table all read the one table. Its constraints are in rules.py.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import FrozenConfigDict

from settings.rules import (
    AUGMENTATIONS,
    BOOLEAN,
    DATASETS,
    DECAY,
    DECAY_STEPS,
    DEVICE_BATCH,
    DIVISION,
    DTYPES,
    EPOCHS,
    EVALUATED,
    FRACTION,
    IMAGE_SIZE,
    MODELS,
    MOMENTUM,
    NOT_NEGATIVE,
    OFFSET,
    PATH,
    POSITIVE,
    RATE,
    SEED,
    SPAN,
    STATUSES,
    TEXT,
    WARMUP,
    WORKERS,
    WORKERS_OR_NONE,
    Rule,
    one_of,
)

# The largest per-device batch of ResNet-50 at 224×224 in fp32 that fits the memory. A hint for
# speed alone: the results do not depend on it.
ACCELERATORS = {'any': 512, 'v100-16gb': 64, 'v100-32gb': 128, 'a100': 256, 'h200': 512}


class ConfigError(ValueError):
    """A configuration that cannot be run; the text lists every fault and what would be right."""


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


def _by_optimizer(suffix: str) -> dict[str, str]:
    return {'lars': f'lars_opt_{suffix}', 'sgd': f'sgd_opt_{suffix}'}


_WARMUP_KEYS = {
    'lars': 'lars_opt_learning_rate_warmup_epochs',
    'sgd': 'opt_learning_rate_warmup_epochs',
}


# fmt: off
_BENCHMARK = (
    # What is trained, on what.
    ('model', str, 'The network.', MODELS),
    ('padding', str, "Of stride-2 windows: PyTorch's (exportable), or the official "
     "TensorFlow graph's.", one_of('symmetric', 'same')),
    ('truncated_init', bool, 'Convolutions start from a truncated normal distribution, else from a '
     'normal one.', BOOLEAN),
    ('dataset', str, 'The data set.', DATASETS),
    ('image_size', int, 'Height and width of an image as the network sees it, pixels.', IMAGE_SIZE),
    ('augmentation', str, 'crop_resize: random area and aspect, resized, flipped; pad_crop: '
     'shifted by up to an eighth of the size; pad_crop_flip: the same, flipped.', AUGMENTATIONS),
    # The tunable hyperparameters of the benchmark.
    ('global_batch_size', int, 'Examples per optimizer step.', POSITIVE, 'global_batch_size'),
    ('bn_span', int, 'Examples whose statistics normalise a training example.', SPAN,
     'model_bn_span'),
    ('optimizer', str, 'The optimizer.', one_of('lars', 'sgd'), 'opt_name'),
    ('learning_rate', float, 'Base learning rate, reached at the end of the warm-up.', RATE,
     _by_optimizer('base_learning_rate')),
    ('end_learning_rate', float, 'Learning rate at the end of the decay.', one_of(0.0001),
     _by_optimizer('end_learning_rate')),
    ('decay_power', int, 'Power of the polynomial decay.', one_of(2),
     _by_optimizer('learning_rate_decay_poly_power')),
    ('warmup_epochs', float, 'Epochs of linear warm-up.', WARMUP, _WARMUP_KEYS),
    ('decay_steps', int, 'Optimizer steps of decay, after the warm-up.', DECAY_STEPS,
     _by_optimizer('learning_rate_decay_steps')),
    ('momentum', float, 'Momentum of the optimizer.', MOMENTUM, _by_optimizer('momentum')),
    ('weight_decay', float, 'λ: LARS adds λ·w to the gradient, SGD 2·λ·w.', DECAY,
     _by_optimizer('weight_decay')),
    ('lars_epsilon', float, "Added to the denominator of LARS's trust ratio.", one_of(0.0),
     {'lars': 'lars_epsilon'}),
    ('label_smoothing', float, 'Probability spread evenly over all classes.', one_of(0.0, 0.1)),
    # When it is judged, and when it ends.
    ('eval_every_epochs', int, 'Epochs between evaluations.', EPOCHS),
    ('eval_offset_epochs', int, 'Evaluates after epochs e ≡ offset (mod eval_every_epochs).',
     OFFSET),
    ('max_epochs', int, 'The run is aborted if it has not met the target by then.', EVALUATED),
    ('target_top1', float, 'Top-1 accuracy on the evaluation set that ends the run.', FRACTION),
    ('dtype', str, 'Of activations and convolutions; all else is float32 always.', DTYPES),
)
_OPTIONAL_BENCHMARK = (
    ('seed', int, "The run's only seed; none: from the system's entropy. Given for debugging and "
     'comparison alone.', SEED, 'seed'),
    ('init_from', str, 'Checkpoint whose weights the run starts from; none: random ones.',
     PATH),
)
_HARDWARE = (
    ('accelerator', str, 'Bounds the automatic per-device batch by its memory.',
     one_of(*ACCELERATORS)),
    ('data_processes', int, 'Decoding processes per training process; 0: threads alone.',
     WORKERS_OR_NONE),
    ('cache_gib', float, 'Decoded images of a split stay in the memory of each process that reads '
     'them, if all of them need at most so many GiB.',
     NOT_NEGATIVE),
    ('deterministic', bool, 'Bitwise reproducible on a GPU too, at some cost in speed.', BOOLEAN),
)
_OPTIONAL_HARDWARE = (
    ('per_device_batch', int, 'Examples per device and micro-step; none: the largest that fits.',
     DEVICE_BATCH),
    ('data_threads', int, 'Decoding threads per process; none: one per core.', WORKERS),
)
_RUN = (
    ('data_dir', str, 'Folder that holds the prepared data sets.', PATH),
    ('log_every_steps', int, 'Optimizer steps between two lines of metrics.', POSITIVE),
    ('drop_page_cache', bool, "Drop the system's page cache first (needs root); the log says "
     'whether it was dropped.', BOOLEAN),
    ('division', str, 'MLPerf division.', DIVISION, 'submission_division'),
    ('org', str, 'Submitting organisation.', TEXT, 'submission_org'),
    ('platform', str, 'Name of the system.', TEXT, 'submission_platform'),
    ('status', str, 'Availability of the system.', STATUSES, 'submission_status'),
)
_OPTIONAL_RUN = (
    ('stall_seconds', int, 'A run in which nothing happens for so long (no step, no evaluation '
     'batch) says where it hangs and is ended, to be resumed; none: never.', POSITIVE),
    ('checkpoint_every_steps', int, 'Optimizer steps between checkpoints beside those at '
     'evaluations; none: no others.', POSITIVE),
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
    if isinstance(value, bool):
        return entry.type is bool
    if entry.type is float:
        return isinstance(value, int | float) and _is_finite(value)
    return isinstance(value, entry.type)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # An integer beyond the range of float.
        return False


def _fault_of(entry: Hyperparameter, value: Any, config: Mapping[str, Any]) -> str | None:
    if not _has_type(entry, value):
        orelse = ' or none' if entry.optional else ''
        return f'{entry.name}={_shown(value)} is not of type {entry.type.__name__}{orelse}'
    try:
        if value is None or entry.rule.holds(value, config):
            return None
        advice = entry.rule.advice(value, config)
    except (TypeError, ZeroDivisionError):  # By another field, which has an error of its own.
        return None
    return f'{entry.name}={_shown(value)} breaks the rule: {entry.rule.words}{advice}'


def _shown(value: Any) -> str:
    """A value in an error, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # An integer of more digits than Python prints.
        return 'a number of thousands of digits'
    return text if len(text) <= 200 else f'{text[:200]}…'


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
    faults = [unknown_name(str(name)) for name in (*base, *overrides) if name not in BY_NAME]
    values = {name: value for name, value in base.items() if name in BY_NAME}
    for name, text in overrides.items():
        if name not in BY_NAME:
            continue
        try:
            values[name] = parse(name, text)
        except ValueError:
            faults.append(f'{name}={_shown(text)} is not of type {BY_NAME[name].type.__name__}')
            values.pop(name, None)
    broken = {fault.split('=', 1)[0] for fault in faults}
    for entry in TABLE:
        if entry.name in values:
            fault = _fault_of(entry, values[entry.name], values)
            faults += [fault] if fault else []
        elif entry.name not in broken:
            faults.append(f'{entry.name} is missing')
    faults += _rate_of_another_optimizer(base, overrides)
    if faults:
        raise ConfigError('The configuration has faults:\n  ' + '\n  '.join(faults))
    return FrozenConfigDict({entry.name: values[entry.name] for entry in TABLE})


def _rate_of_another_optimizer(base: Mapping[str, Any], overrides: Mapping[str, str]) -> list[str]:
    """LARS and SGD take rates of different size, so one must not be used for the other."""
    ours, theirs = overrides.get('optimizer'), base.get('optimizer')
    if ours not in ('lars', 'sgd') or ours == theirs or 'learning_rate' in overrides:
        return []
    return [
        f'learning_rate={_shown(base.get("learning_rate"))} is given for optimizer={theirs}; with '
        f'optimizer={ours} add --config.learning_rate=RATE'
    ]


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
