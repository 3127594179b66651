# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run, once: its name, type, rule, MLPerf log key and meaning.

`Config` declares the fields that all workloads have; a workload extends it with its own, and may
declare one again with a narrower rule. A mapping from names to values goes in; out comes either
every error that it has, at once, or a frozen `Config` that is known to be good. Validation, flags,
log lines and the documents' tables all read the same declarations.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from settings.errors import ConfigError
from settings.rules import (
    BOOLEAN,
    DTYPES,
    PATH,
    POSITIVE,
    SEED,
    STATUSES,
    TEXT,
    WORKERS,
    WORKERS_OR_NONE,
    Rule,
    divides,
)

# 'benchmark' fields decide what is computed; 'hardware' fields only how fast; 'run' fields only
# what is written about it.
Group = Literal['benchmark', 'hardware', 'run']


def field(
    rule: Rule,
    help: str,  # noqa: A002
    *,
    log_key: str | Mapping[str, str] | None = None,
    group: Group = 'benchmark',
    fits: str | None = None,
) -> Any:
    """Declares a field of a configuration.

    Args:
      rule: its constraint.
      help: what it means, with its unit.
      log_key: the MLPerf log key, or one for each optimizer, or None if the rules log none.
      group: what the field decides.
      fits: another field that its value was chosen for: a flag that changes that one must come with
        a flag for this one.
    """
    return dataclasses.field(
        metadata={'rule': rule, 'help': help, 'log_key': log_key, 'group': group, 'fits': fits}
    )


_hardware = functools.partial(field, group='hardware')
_run = functools.partial(field, group='run')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The fields that every workload has."""

    benchmark: str = field(TEXT, 'The benchmark, by the name that MLPerf gives it.')
    model: str = field(TEXT, 'The network.')
    dataset: str = field(TEXT, 'The data set.')
    global_batch_size: int = field(
        POSITIVE, 'Examples per optimizer step.', log_key='global_batch_size'
    )
    micro_batch_size: int = field(
        divides('global_batch_size'),
        'Examples that a device computes at a time (docs/performance.md: what fits a GPU). '
        'Another number is the same mathematics with other rounding.',
    )
    optimizer: str = field(TEXT, 'The optimizer.', log_key='opt_name')
    dtype: str = field(
        DTYPES, 'Dtype of activations and matrix products; everything else is always float32.'
    )
    seed: int | None = field(
        SEED,
        "The run's only seed; none: from the system's entropy. Set it only to debug or to compare "
        'runs; submissions leave it at none.',
        log_key='seed',
    )
    init_from: str | None = field(
        PATH, 'Checkpoint whose weights the run starts from; none: random ones.'
    )

    data_processes: int = _hardware(
        WORKERS_OR_NONE, 'Decoding processes per training process; 0: threads alone.'
    )
    data_threads: int | None = _hardware(
        WORKERS, 'Decoding threads per process; none: one per core.'
    )
    deterministic: bool = _hardware(
        BOOLEAN, 'Bitwise reproducible on a GPU too, at some cost in speed.'
    )

    data_dir: str = _run(PATH, 'Folder that holds the prepared data sets.')
    log_every_steps: int = _run(POSITIVE, 'Optimizer steps between two lines of metrics.')
    checkpoint_every_steps: int | None = _run(
        POSITIVE,
        'Optimizer steps between checkpoints beside those at evaluations; none: no others.',
    )
    stall_seconds: int | None = _run(
        POSITIVE,
        'Seconds without progress (no step, no evaluation batch) after which the run prints where '
        'it hangs and ends, to be resumed; none: no limit.',
    )
    drop_page_cache: bool = _run(
        BOOLEAN,
        "Drop the system's page cache first (needs root); the log says whether it was dropped.",
    )
    division: str = _run(TEXT, 'MLPerf division.', log_key='submission_division')
    org: str = _run(TEXT, 'Submitting organisation.', log_key='submission_org')
    platform: str = _run(TEXT, 'Name of the system.', log_key='submission_platform')
    status: str = _run(STATUSES, 'Availability of the system.', log_key='submission_status')


AnyConfig = TypeVar('AnyConfig', bound=Config)


@dataclasses.dataclass(frozen=True)
class Field:
    """A declared field; see `field` for what the attributes mean.

    An int is accepted for a float; None is a value of an optional field.
    """

    name: str
    type: type
    optional: bool
    rule: Rule
    help: str
    log_key: str | Mapping[str, str] | None
    group: Group
    fits: str | None


def table(config_type: type[Config]) -> dict[str, Field]:
    """The fields of a workload's configuration by name, those that decide the result first."""
    annotated = typing.get_type_hints(config_type)
    fields = []
    for declared in dataclasses.fields(config_type):
        kind = annotated[declared.name]
        optional = isinstance(kind, types.UnionType)
        if optional:
            kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
        fields.append(Field(declared.name, kind, optional, **declared.metadata))
    groups = typing.get_args(Group)
    return {entry.name: entry for entry in sorted(fields, key=lambda f: groups.index(f.group))}


def parse(entry: Field, text: str) -> Any:
    """The value of a flag's text: 'none' where optional, 'true'/'false' for a bool.

    Raises:
      ValueError: when the text is no value of the field's type.
    """
    if entry.optional and text.lower() == 'none':
        return None
    if entry.type is bool:
        return ('false', 'true').index(text.lower()) == 1
    return entry.type(text)


def _has_type(entry: Field, value: Any) -> bool:
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


def _error_of(entry: Field, values: Mapping[str, Any], typed: Mapping[str, Any]) -> str | None:
    """What is wrong with a field; `typed` are the values that have their field's type."""
    value, rule = values[entry.name], entry.rule
    if entry.name not in typed:
        orelse = ' or none' if entry.optional else ''
        return f'{entry.name}={_shown(value)} is not of type {entry.type.__name__}{orelse}'
    if value is None or not all(name in typed for name in rule.reads):
        return None
    others = [typed[name] for name in rule.reads]
    if rule.holds(value, *others):
        return None
    return (
        f'{entry.name}={_shown(value)} breaks the rule: {rule.words}{rule.advice(value, *others)}'
    )


def _shown(value: Any) -> str:
    """A value in an error, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # An integer of more digits than Python prints.
        return 'a number of thousands of digits'
    return text if len(text) <= 200 else f'{text[:200]}…'


def unknown_name(config_type: type[Config], name: str) -> str:
    """The error of a field that does not exist, with the closest that does."""
    close = difflib.get_close_matches(name, table(config_type), n=1, cutoff=0.5)
    return f'unknown hyperparameter {name}' + (f'; did you mean {close[0]}?' if close else '')


def resolve(
    config_type: type[AnyConfig], base: Mapping[str, Any], overrides: Mapping[str, str]
) -> AnyConfig:
    """Checks a configuration as a whole.

    Args:
      config_type: the workload's.
      base: values by name, from a configuration file.
      overrides: texts by name, from flags; they win.

    Raises:
      ConfigError: listing every error, each with field, value and rule.
    """
    fields = table(config_type)
    errors = [
        unknown_name(config_type, str(name)) for name in (*base, *overrides) if name not in fields
    ]
    values = {name: value for name, value in base.items() if name in fields}
    for name, text in overrides.items():
        if name not in fields:
            continue
        try:
            values[name] = parse(fields[name], text)
        except ValueError:
            errors.append(f'{name}={_shown(text)} is not of type {fields[name].type.__name__}')
            values.pop(name, None)
    reported = {error.split('=', 1)[0] for error in errors}
    typed = {name: value for name, value in values.items() if _has_type(fields[name], value)}
    for entry in fields.values():
        if entry.name in values:
            error = _error_of(entry, values, typed)
            errors += [error] if error else []
        elif entry.name not in reported:
            errors.append(f'{entry.name} is missing')
        errors += _stale(entry, base, overrides, typed)
    if errors:
        raise ConfigError('The configuration has errors:\n  ' + '\n  '.join(errors))
    return config_type(**values)


def _stale(
    entry: Field,
    base: Mapping[str, Any],
    overrides: Mapping[str, str],
    typed: Mapping[str, Any],
) -> list[str]:
    """The error of a value that was chosen for another value of the field that it fits."""
    other = entry.fits
    if other is None or other not in overrides or entry.name in overrides:
        return []
    ours, theirs = typed.get(other), base.get(other)
    if ours is None or ours == theirs:
        return []
    return [
        f'{entry.name}={_shown(base.get(entry.name))} is given for {other}={theirs}; with '
        f'{other}={ours} add --config.{entry.name}=VALUE'
    ]


def decisive(values: Mapping[str, Any], config_type: type[Config]) -> dict[str, Any]:
    """Of a configuration's values those that decide what is computed."""
    fields = table(config_type).items()
    return {name: values.get(name) for name, entry in fields if entry.group == 'benchmark'}


def differences(ours: Config, theirs: Mapping[str, Any], *, also_logged: bool = False) -> list[str]:
    """Fields that have other values in another configuration.

    Those that decide what is computed; with `also_logged` those that are in the log, too.
    """
    return [
        f'{name}: {theirs.get(name)!r} there, {getattr(ours, name)!r} here'
        for name, entry in table(type(ours)).items()
        if entry.group == 'benchmark' or (also_logged and entry.log_key)
        if getattr(ours, name) != theirs.get(name)
    ]


def logged(config: Config) -> dict[str, Any]:
    """The MLPerf log lines of a configuration, value by key, for the optimizer in use."""
    lines = {}
    for name, entry in table(type(config)).items():
        key = entry.log_key
        if isinstance(key, Mapping):
            key = key.get(config.optimizer)
        if key:
            lines[key] = getattr(config, name)
    return lines
