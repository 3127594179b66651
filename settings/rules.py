# SPDX-License-Identifier: Apache-2.0
"""What a field's value must meet: the kind of rule, and the rules that any workload can use."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

INT32_LIMIT = 2**31  # Counts of steps and examples are int32 on the device.
MOST_WORKERS = 1024


def _no_advice(*values: Any) -> str:
    return ''


@dataclasses.dataclass(frozen=True)
class Rule:
    """A constraint: in words, and as a function that says whether a value meets it.

    Attributes:
      words: what is legal.
      holds: takes the value, then the values of the fields in `reads`. If one of these is missing
        or of the wrong type, the rule is not applied: that field has an error of its own.
      reads: names of other fields that decide.
      advice: takes the same, and returns what to add to the error of a value that breaks the rule.
    """

    words: str
    holds: Callable[..., bool]
    reads: tuple[str, ...] = ()
    advice: Callable[..., str] = _no_advice


def one_of(*values: Any) -> Rule:
    """The value is among these."""
    return Rule('one of ' + ', '.join(map(str, values)), lambda value: value in values)


def at_most(limit: int) -> Rule:
    """A positive integer up to a limit."""
    return Rule(f'> 0 and ≤ {limit}', lambda value: 0 < value <= limit)


def divides(name: str) -> Rule:
    """A positive integer that divides another field's value."""
    return Rule(
        f'> 0 and divides {name}',
        lambda value, other: value > 0 and other % value == 0,
        (name,),
        lambda value, other: f' ({name}={other})',
    )


def division(closed: Mapping[str, Any]) -> Rule:
    """The MLPerf division.

    Args:
      closed: the values that the closed division fixes, by field. The seed must be among them, as
        None: it may come from the system's entropy only.
    """

    def different(values: tuple[Any, ...]) -> dict[str, Any]:
        named = zip(closed.items(), values, strict=True)
        return {name: value for (name, wanted), value in named if value != wanted}

    def advice(value: str, *values: Any) -> str:
        if value != 'closed':
            return ''
        others = different(values)
        text = f'; with {_listed(others)} add --config.division=open'
        if 'seed' in others:
            text += ', or --config.seed=none, with which a run that resumes keeps its own'
        return text

    def holds(value: str, *values: Any) -> bool:
        return value == 'open' or (value == 'closed' and not different(values))

    return Rule(
        f'open; or closed, for which {_listed(closed).lower()}', holds, tuple(closed), advice
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ', '.join(f'{name}={value}' for name, value in values.items())


BOOLEAN = Rule('true or false', lambda value: True)
POSITIVE = Rule('> 0 and < 2^31', lambda value: 0 < value < INT32_LIMIT)
NOT_NEGATIVE = Rule('≥ 0', lambda value: value >= 0)
FRACTION = Rule('in (0, 1)', lambda value: 0 < value < 1)
WORKERS = at_most(MOST_WORKERS)
WORKERS_OR_NONE = Rule(f'≥ 0 and ≤ {MOST_WORKERS}', lambda value: 0 <= value <= MOST_WORKERS)
TEXT = Rule('not empty, on one line', lambda value: bool(value.strip()) and value.isprintable())
PATH = Rule('a path', lambda value: bool(value) and '\0' not in value)
SEED = Rule('in [0, 2^63)', lambda value: 0 <= value < 2**63)
DTYPES = one_of('float32', 'bfloat16', 'float16')
STATUSES = one_of('cloud', 'onprem', 'preview', 'research')
