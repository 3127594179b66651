# SPDX-License-Identifier: Apache-2.0
"""The run's MLPerf log: every event once, whatever interrupts the run.

Process 0 appends `:::MLLOG` lines through mlperf-logging. An event that the log already holds (same
key and metadata) is not written again, so that a run which resumes from a checkpoint, and passes
the same points once more, leaves one valid log. Other processes hold a log without a file.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants, mllog

import hyperparameters
from plan import Evaluation, Plan

BENCHMARK = constants.RESNET
_ROOT = Path(__file__).resolve().parent
_PLACE = ('file', 'lineno')  # Metadata that does not tell events apart.


def _identity(event_type: str, key: str, metadata: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in metadata.items() if name not in _PLACE}
    kept.pop('status', None)
    return json.dumps([event_type, key, kept], sort_keys=True)


class LogError(ValueError):
    """A log with a line that is no event; the text names the line."""


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
            _ = event['time_ms'], event['event_type'], event['key'], event['value']
            _ = event['metadata'].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LogError(
                f'line {number} of {path} is damaged: {line.strip()[:200]}; start again in an '
                'empty work directory'
            ) from error
        events.append(event)
    return events


class EventLog:
    """The log at `path`, or nowhere (None)."""

    def __init__(self, path: Path | None):
        self._events: dict[str, dict[str, Any]] = {}
        self._logger = None
        if path is None:
            return
        if path.exists():
            there = path.read_bytes()
            if not there.endswith(b'\n'):  # A killed process may leave half a line.
                os.truncate(path, there.rfind(b'\n') + 1)
            for event in read(path):
                self._remember(event['event_type'], event['key'], event['metadata'], event)
        logger = logging.Logger(str(path))
        logger.addHandler(logging.FileHandler(path, delay=True))  # No file before the first event.
        # The place in the log is that of the caller of this class's methods.
        self._logger = mllog.MLLogger(
            logger, default_stack_offset=3, root_dir=re.escape(str(_ROOT))
        )

    def _remember(self, event_type, key, metadata, event) -> None:
        self._events[_identity(event_type, key, metadata)] = event

    def _write(self, event_type: str, key: str, value: Any, metadata: dict[str, Any]) -> Any:
        if self._logger is None:
            return value
        before = self._events.get(_identity(event_type, key, metadata))
        if before:
            return before['value']
        write = {
            constants.INTERVAL_START: self._logger.start,
            constants.INTERVAL_END: self._logger.end,
            constants.POINT_IN_TIME: self._logger.event,
        }[event_type]
        write(key, value, metadata=metadata)
        event = {'key': key, 'value': value, 'metadata': metadata}
        self._remember(event_type, key, metadata, event)
        return value

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
    def status(self) -> str | None:
        """'success' or 'aborted' once the run has ended."""
        for event in self._events.values():
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

    def header(self, config: Mapping[str, Any], plan: Plan) -> None:
        """Who runs what, with which hyperparameters: all read from what the run uses."""
        self.event(constants.SUBMISSION_BENCHMARK, BENCHMARK)
        for key, value in hyperparameters.logged(config).items():
            self.event(key, value)
        self.event(constants.GRADIENT_ACCUMULATION_STEPS, plan.accumulation_steps)
        self.event(constants.TRAIN_SAMPLES, plan.num_train)
        self.event(constants.EVAL_SAMPLES, plan.num_eval)

    def block_start(self, evaluation: Evaluation) -> None:
        """Training of the epochs up to an evaluation begins."""
        self.start(constants.BLOCK_START, **_block(evaluation))

    def block_stop(self, evaluation: Evaluation) -> None:
        """Training of the epochs up to an evaluation has ended."""
        self.stop(constants.BLOCK_STOP, **_block(evaluation))

    def eval_start(self, evaluation: Evaluation) -> None:
        """An evaluation begins."""
        self.start(constants.EVAL_START, epoch_num=evaluation.epoch)

    def eval_stop(self, evaluation: Evaluation, top1: float) -> float:
        """An evaluation has ended with this accuracy; returns the one that the log holds."""
        logged = self.event(constants.EVAL_ACCURACY, top1, epoch_num=evaluation.epoch)
        self.stop(constants.EVAL_STOP, epoch_num=evaluation.epoch)
        return logged

    def run_stop(self, reached: bool) -> None:
        """The run has ended, at its target or without."""
        self.stop(constants.RUN_STOP, status=constants.SUCCESS if reached else constants.ABORTED)


def _drop_page_cache() -> bool:
    os.sync()
    try:
        Path('/proc/sys/vm/drop_caches').write_text('3')
    except OSError:  # Not Linux, or not root.
        return False
    return True


def _block(evaluation: Evaluation) -> dict[str, int]:
    return {
        'first_epoch_num': evaluation.first_epoch,
        'epoch_count': evaluation.epoch - evaluation.first_epoch + 1,
    }
