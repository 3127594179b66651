# SPDX-License-Identifier: Apache-2.0
"""The run's MLPerf log: every event once, whatever interrupts the run.

Process 0 appends `:::MLLOG` lines through mlperf-logging. An event that the log already holds (same
key and metadata) is not written again, so that a run which resumes from a checkpoint, and passes
the same points once more, leaves one valid log. Other processes hold a log without a file.

What a log must hold before a run adds to it is in `log_check`.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants, mllog

from run_files.line_file import LineFile
from settings import hyperparameters
from settings.errors import RejectedError, SaveError
from settings.hyperparameters import Config
from settings.plan import Evaluation, Plan

_ROOT = Path(__file__).resolve().parent.parent
_PLACE = ('file', 'lineno')  # Metadata that does not tell events apart.
# As submitters log their speed; mlperf-logging has no name for it.
TRACKED_STATS = 'tracked_stats'
# Values that may differ between the starts of one run: it may resume on other devices.
_OF_A_START = (constants.CACHE_CLEAR, constants.GRADIENT_ACCUMULATION_STEPS, TRACKED_STATS)
REMEDY = 'put the whole log of this run back, or start in a new work directory (--workdir)'


def _identity(event_type: str, key: str, metadata: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in metadata.items() if name not in _PLACE}
    kept.pop('status', None)
    return json.dumps([event_type, key, kept], sort_keys=True)


class LogError(RejectedError, ValueError):
    """A log that this run cannot have written, or cannot add to; the text says what to do."""


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a log, in order.

    Lines that are not MLPerf's are skipped, and so is a last one that was cut short.

    Raises:
      LogError: when another line is damaged.
    """
    events = []
    try:
        lines = path.read_text().splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise LogError(f'{path} is no text: it is damaged, or no log') from error
    for number, line in enumerate(lines, start=1):
        if not line.startswith(':::MLL') or not line.endswith('\n'):
            continue
        try:
            event = json.loads(line.partition(' ')[2])
            _ = event['event_type'], event['value'], event['metadata'].items()
            if not (0 <= event['time_ms'] < 10**14 and isinstance(event['key'], str)):
                raise ValueError('no time or key')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LogError(
                f'line {number} of {path} is damaged: {line.strip()[:200]}; start again in an '
                'empty work directory'
            ) from error
        events.append(event)
    return events


def _steady_clock() -> Callable[[], int]:
    """Milliseconds since the epoch, by the system's clock now and by its steady one from here on.

    Somebody may set the system's clock while a run is timed.
    """
    offset = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return lambda: (offset + time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 1_000_000


class _Append(logging.Handler):
    """Hands mlperf-logging's lines to a file; unlike logging's own handlers it hides no error."""

    def __init__(self, file: LineFile):
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        self._file.write(self.format(record))


class EventLog:
    """The log at `path`, or nowhere (None). Nothing is written before the first event.

    Args:
      path: where it is, or will be.
      now_ms: milliseconds since the epoch.

    Attributes:
      recorded: the events that were there when it was opened.

    Raises:
      LogError: when the log that is there cannot be read.
    """

    def __init__(self, path: Path | None, now_ms: Callable[[], int] | None = None):
        self.path, self.now_ms = path, now_ms or _steady_clock()
        self._events: dict[str, dict[str, Any]] = {}
        self.recorded: list[dict[str, Any]] = []
        self._file: LineFile | None = None
        self._logger: mllog.MLLogger | None = None
        if path is None or not path.exists():
            return
        try:
            self.recorded = read(path)
        except OSError as error:
            raise LogError(f'{path} cannot be read ({error.strerror}); {REMEDY}') from error
        for event in self.recorded:
            self._remember(event['event_type'], event['key'], event['metadata'], event)

    def _open(self) -> mllog.MLLogger:
        assert self.path is not None
        there = self.path.read_bytes() if self.path.exists() else b''
        # A killed process may have left half a line.
        self._file = LineFile(self.path, size=there.rfind(b'\n') + 1)
        logger = logging.Logger(str(self.path))
        logger.addHandler(_Append(self._file))
        # The place in the log is that of the caller of this class's methods.
        return mllog.MLLogger(logger, default_stack_offset=3, root_dir=re.escape(str(_ROOT)))

    def _remember(self, event_type, key, metadata, event) -> None:
        self._events[_identity(event_type, key, metadata)] = event

    def _write(self, event_type: str, key: str, value: Any, metadata: dict[str, Any]) -> Any:
        before = self._events.get(_identity(event_type, key, metadata))
        if before:
            return before['value']
        event = {'event_type': event_type, 'key': key, 'value': value, 'metadata': metadata}
        self._remember(event_type, key, metadata, event)
        if self.path is None:
            return value
        self._logger = self._logger or self._open()
        write = {
            constants.INTERVAL_START: self._logger.start,
            constants.INTERVAL_END: self._logger.end,
            constants.POINT_IN_TIME: self._logger.event,
        }[event_type]
        write(key, value, metadata=metadata, time_ms=self.now_ms())
        return value

    def sync(self) -> None:
        """Returns when all events are on the disk: no checkpoint must outlive those before it."""
        if self._file:
            self._file.sync()

    def event(self, key: str, value: Any, **metadata: Any) -> Any:
        """Something that happened, or a fact about the run; returns the value in the log."""
        return self._write(constants.POINT_IN_TIME, key, value, metadata)

    def start(self, key: str, **metadata: Any) -> None:
        """The beginning of an interval."""
        self._write(constants.INTERVAL_START, key, None, metadata)

    def stop(self, key: str, **metadata: Any) -> None:
        """The end of an interval."""
        self._write(constants.INTERVAL_END, key, None, metadata)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What was there and what has been added, in order; without times in what was added."""
        return list(self._events.values())

    @property
    def status(self) -> str | None:
        """'success' or 'aborted' once the run has ended."""
        for event in self.events:
            if event['key'] == constants.RUN_STOP:
                return event['metadata']['status']
        return None

    def cache_clear(self, drop: bool) -> None:
        """Drops the system's page cache if asked to; the value says whether it was dropped."""
        self.event(constants.CACHE_CLEAR, drop and _drop_page_cache())

    def init_start(self) -> None:
        """Untimed initialisation begins."""
        self.start(constants.INIT_START)

    def init_stop(self) -> None:
        """Untimed initialisation has ended."""
        self.stop(constants.INIT_STOP)

    def run_start(self) -> None:
        """The clock starts; from here on data may be read."""
        self.start(constants.RUN_START)

    def header(self, config: Config, plan: Plan) -> None:
        """Who runs what, with which hyperparameters: all read from what the run uses."""
        self.event(constants.SUBMISSION_BENCHMARK, config.benchmark)
        for key, value in hyperparameters.logged(config).items():
            self.event(key, value)
        for key, value in plan.course.ruleset.facts.items():
            self.event(key, value)
        self.event(constants.GRADIENT_ACCUMULATION_STEPS, plan.accumulation_steps)
        self.event(constants.TRAIN_SAMPLES, plan.num_train)
        self.event(constants.EVAL_SAMPLES, plan.num_eval)

    def block_start(self, evaluation: Evaluation) -> None:
        """Training up to an evaluation begins."""
        self.start(constants.BLOCK_START, **evaluation.block_start)

    def block_stop(self, evaluation: Evaluation) -> None:
        """Training up to an evaluation has ended."""
        self.stop(constants.BLOCK_STOP, **evaluation.block_stop)

    def tracked_stats(self, evaluation: Evaluation, stats: Mapping[str, float | str]) -> None:
        """How fast the training up to an evaluation was."""
        self.event(TRACKED_STATS, dict(stats), step=evaluation.step, **evaluation.result)

    def eval_start(self, evaluation: Evaluation) -> None:
        """An evaluation begins."""
        self.start(constants.EVAL_START, **evaluation.result)

    def eval_stop(self, evaluation: Evaluation, quality: float) -> float:
        """An evaluation has ended with this quality; returns the one that the log holds."""
        logged = self.event(constants.EVAL_ACCURACY, quality, **evaluation.result)
        self.stop(constants.EVAL_STOP, **evaluation.result)
        return logged

    def run_stop(self, reached: bool) -> None:
        """The run has ended, at its target or without.

        Raises:
          SaveError: when the file does not hold what was written to it.
        """
        self.stop(constants.RUN_STOP, status=constants.SUCCESS if reached else constants.ABORTED)
        if self.path is None:
            return
        try:
            there = read(self.path)
        except (OSError, LogError) as error:
            raise SaveError(f'the log of this run is lost: {error}') from error
        written = self.events
        if len(there) != len(written) or not all(map(is_same, there, written)):
            raise SaveError(
                f'{self.path} does not hold what this run has written to it; start in a new work '
                'directory (--workdir)'
            )


def _drop_page_cache() -> bool:
    os.sync()
    try:
        Path('/proc/sys/vm/drop_caches').write_text('3')
    except OSError:  # Not Linux, or not root.
        return False
    return True


def facts(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event's metadata without its place in the code."""
    return {name: value for name, value in event['metadata'].items() if name not in _PLACE}


def is_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two events say the same, at whatever time."""
    value_counts = a['key'] not in _OF_A_START
    return ((a['event_type'], a['key'], facts(a)) == (b['event_type'], b['key'], facts(b))) and (
        not value_counts or a['value'] == b['value']
    )
