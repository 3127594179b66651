# SPDX-License-Identifier: Apache-2.0
"""What a run tells people: a progress line, WORKDIR/metrics.jsonl and TensorBoard events.

Process 0 alone reports. Metrics are examples and seconds of what was really done; nothing here
feeds back into the run.
"""

import contextlib
import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from run_files.line_file import LineFile
from run_files.terminal import show
from settings.plan import Evaluation, Plan

FLUSH_SECONDS = 30
BUSY_SECONDS = 5


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f'{hours}:{rest // 60:02}:{rest % 60:02}'


def fitted(fields: Sequence[tuple[int, str]], columns: int) -> str:
    """As many of the fields as fit into a line, in order.

    Args:
      fields: (rank, text); the highest ranks are left out first. Rank 0 always stays.
      columns: of the terminal; the line keeps clear of the last one, where some terminals wrap.
    """
    kept = list(fields)
    while len('  '.join(text for _, text in kept)) >= columns and max(kept)[0] > 0:
        kept.remove(max(kept))
    return '  '.join(text for _, text in kept)


class TensorBoard:
    """Scalars as TensorBoard events in a folder, if tensorboardX is installed.

    Written in the calling thread: tensorboardX's own SummaryWriter has one that dies of a full disk
    and then blocks the run.

    Args:
      folder: is made if it is missing.
      first_step: hides what earlier starts wrote of this step and later ones.
      report: is called once, with the reason, if events cannot be written.
    """

    def __init__(self, folder: Path, first_step: int, report: Callable[[str], None]):
        self._report, self._flushed = report, time.monotonic()
        self._writer: Any = None
        try:
            # It imports PyTorch where that is installed, which costs a second.
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        except ImportError:
            report('TensorBoard events: off (tensorboardX is not installed)')
            return
        self._event, self._scalar = event_pb2.Event, summary.scalar
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        try:
            folder.mkdir(exist_ok=True)
            self._writer = event_file_writer.EventsWriter(str(folder / 'events'))
            self._write(step=first_step, session_log=start)
        except OSError as error:
            self._failed(error)

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **fields))

    def _failed(self, error: OSError) -> None:
        self._writer = None
        self._report(f'TensorBoard events: off ({error.strerror})')

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._write(step=step, summary=self._scalar(name, value))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        """Ends the file."""
        writer, self._writer = self._writer, None
        try:
            if writer:
                writer.close()
        except OSError as error:
            self._failed(error)


class Progress:
    """Writes and shows a run's metrics.

    Args:
      workdir: where to write; None for the processes that do not.
      plan: the run's.
      first_step: the step that the run starts or resumes from; later lines of metrics.jsonl are
        dropped, for they are about to be written again.

    Raises:
      SaveError: when metrics.jsonl cannot be written; so do `training` and `evaluation`.
    """

    def __init__(self, workdir: Path | None, plan: Plan, first_step: int):
        self._plan, self._first_step = plan, first_step
        self._digits = 0 if plan.course.examples_per_unit == 1 else 2
        self._terminal, self._open_line = sys.stdout.isatty(), False
        self._started, self._elapsed = time.monotonic(), 0.0
        self._file: LineFile | None = None
        if workdir is None:
            return
        path = workdir / 'metrics.jsonl'
        lines, damaged = _kept(path, first_step)
        whole = path.with_suffix('.part')  # A kill in between must not cost the file.
        self._file = LineFile(whole, size=0)
        if lines:
            self._file.write('\n'.join(map(json.dumps, lines)))
            self._elapsed = lines[-1].get('elapsed_seconds', 0.0)
        self._file.rename(path)
        if damaged:
            self.say(f'{path}: {damaged} damaged line(s) dropped')
        self._events = TensorBoard(workdir / 'tensorboard', first_step + 1, self.say)

    def begin(self) -> None:
        """The first step begins: what counts as the run's time starts here."""
        self._started = time.monotonic()

    def _write(self, step: int, values: Mapping[str, float], **texts: str) -> None:
        assert self._file
        elapsed = self._elapsed + time.monotonic() - self._started
        course = self._plan.course
        line: dict[str, Any] = {'step': step, course.unit: round(self._plan.position(step), 4)}
        # An evaluation's loss may overflow in half precision, which JSON cannot say.
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line | texts | {'elapsed_seconds': elapsed}))
        self._events.write(step, values)

    def say(self, text: str) -> None:
        """A line for people."""
        if self._file:
            self._end_line()
            show(text)

    @contextlib.contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Says every few seconds what the body is doing and for how long, should it take long."""
        started, done = time.monotonic(), threading.Event()

        def report() -> None:
            while not done.wait(BUSY_SECONDS):
                self.say(f'{doing}: {time.monotonic() - started:.0f} s')

        reporter = threading.Thread(target=report, name=doing, daemon=True)
        reporter.start()
        try:
            yield
        finally:
            done.set()
            reporter.join()

    def _end_line(self) -> None:
        """What is printed next starts a line of its own."""
        if self._open_line:
            show('\r\x1b[K', end='')
            self._open_line = False

    def training(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of the training steps since the last call; 'step_loss' is the last step's own."""
        if not self._file:
            return
        self._write(step, values)
        pace = (time.monotonic() - self._started) / max(step - self._first_step, 1)
        fields = [
            (0, f'{self._plan.course.unit} {self._plan.position(step):6.{self._digits}f}'),
            (1, f'step {step}/{self._plan.total_steps}'),
            (2, f'loss {values["loss"]:.4f}'),
            (6, f'rate {values["learning_rate"]:.4g}'),
            (4, f'{values["throughput"]:,.0f} {self._plan.course.throughput_unit}'),
            (3, f'at most {_duration(pace * (self._plan.total_steps - step))} left'),
        ]
        if 'mfu' in values:
            fields.append((5, f'MFU {values["mfu"]:.1%}'))
        if self._terminal:
            text = fitted(fields, shutil.get_terminal_size().columns)
            show(f'\r\x1b[K{text}', end='')
            self._open_line = True
        else:
            show('  '.join(text for _, text in fields))

    def evaluation(self, at: Evaluation, values: Mapping[str, float], fingerprint: str) -> None:
        """The result of an evaluation.

        Args:
          at: which one.
          values: the target's metric, the loss, and the time it took.
          fingerprint: of the state that was evaluated.
        """
        if not self._file:
            return
        self._write(at.step, values, fingerprint=fingerprint)
        target, loss = self._plan.target, values['eval_loss']
        fields = [
            f'{self._plan.course.unit} {at.count:6}',
            f'step {at.step}',
            f'{target.words} {values[target.metric]:.5f}',
            f'loss {loss:.4f}',
            fingerprint,
        ]
        if target.metric == 'eval_loss':
            del fields[3]
        self.say('  '.join(fields))

    def close(self) -> None:
        """Ends the files and the line."""
        if self._file:
            self._end_line()
            self._events.close()


def _kept(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """The metrics up to a step, and how many lines are damaged.

    The evaluation that follows a step is done again by a run that resumes from there.
    """
    kept, damaged = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
            before = values['step'] < step or (values['step'] == step and 'eval_loss' not in values)
            float(values.get('elapsed_seconds', 0))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            damaged += 1
            continue
        if before:
            kept.append(values)
    return kept, damaged
