# SPDX-License-Identifier: Apache-2.0
"""A run in motion: trains, evaluates, saves and logs, until the target or a request to stop.

The device is never made to wait for Python: the next step is dispatched before the last one's
metrics are read, and batches are on their way to the device while it computes.
"""

import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping

import jax

import train_lib
from accumulation import LARGEST_GRADIENT, LARGEST_VALUE
from input_pipeline import Pipeline
from run_files import machine
from run_files.mlperf_log import EventLog
from run_files.profiling import Trace
from run_files.progress import Progress
from settings.errors import FailedError, Outcome, SaveError
from settings.hyperparameters import Config
from settings.plan import Evaluation, Plan
from train_lib import Model, TrainState
from training import checkpointing, compilation, evaluation, metrics, processes
from training.checkpoint_saver import CheckpointSaver
from training.compilation import Programs
from training.device_feed import Clock, on_devices
from training.stop_request import StopRequest
from training.watchdog import Watchdog


class DivergedError(FailedError):
    """A loss or a gradient is not finite, or too large to be added up."""


_DIVERGED = (
    'Training has diverged, maybe some steps before; the same command would come to the same step. '
    'Start in a new work directory, with a lower learning_rate, a longer warm-up or another seed'
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of once it is set up."""

    config: Config
    plan: Plan
    model: Model
    programs: Programs
    pipeline: Pipeline
    log: EventLog
    progress: Progress
    saver: CheckpointSaver
    stop: StopRequest
    trace: Trace
    watchdog: Watchdog


class Run:
    """The training loop of one process, with its state."""

    def __init__(self, parts: Parts, state: TrainState):
        self.parts, self.state = parts, state
        self.step = int(jax.device_get(state.step))
        self._pending: collections.deque = collections.deque()
        self._laps: list[Mapping[str, float]] = []
        self._clock = Clock()
        self._peak = machine.peak(jax.devices()[0].device_kind, parts.config.dtype)
        self._stopped = False
        self._fingerprint = ''  # Of the state that was saved last.

    def train_block(self, last_step: int) -> None:
        """Trains up to a step, or until the run is asked to stop."""
        parts, micro_steps = self.parts, self.parts.plan.accumulation_steps
        batches = on_devices(
            parts.pipeline.train(self.step * micro_steps, last_step * micro_steps),
            parts.programs.mesh,
            self._clock,
        )
        while self.step < last_step and not self._stopped:
            parts.trace.at(self.step, self.state)
            found = []
            for _ in range(micro_steps):
                self.state, values = parts.programs.train(self.state, next(batches))
                found.append(values)
            self.step += 1
            self._pending.append((self.step, found, parts.stop.poll()))
            if len(self._pending) > 1:
                self._read_metrics()
            every = parts.config.checkpoint_every_steps
            if every and self.step % every == 0 and self.step < last_step:
                self.save()
        self._drain()
        parts.trace.end(self.state)

    def _drain(self) -> None:
        while self._pending:
            self._read_metrics()

    def _read_metrics(self) -> None:
        """Reads the metrics of the oldest step in flight, which waits for it to end."""
        step, micro, stop = self._pending.popleft()
        micro, stop = jax.device_get((micro, stop))
        if micro[-1]['rejected'].any():
            names = metrics.rejected_names(self.state.variables, micro[-1]['rejected'])
            raise DivergedError(
                f'not finite or out of range at step {step}: {", ".join(names)}; that step moved '
                f'no weight. An element of a gradient may be up to {LARGEST_GRADIENT:g}, of '
                f'statistics and metrics up to {LARGEST_VALUE:g}. {_DIVERGED}'
            )
        self.parts.watchdog.beat(f'step {step}')
        self._stopped = self._stopped or bool(stop)
        self._laps.append(metrics.measured(micro, self.parts.plan.micro_batches))
        if step % self.parts.config.log_every_steps == 0:
            self._report(step)

    def _report(self, step: int) -> None:
        parts = self.parts
        seconds, waiting = self._clock.lap()
        laps, self._laps = self._laps, []
        values = {name: statistics.fmean(lap[name] for lap in laps) for name in laps[0]}
        values |= {
            'step_loss': laps[-1]['loss'],
            'largest_gradient': max(lap['largest_gradient'] for lap in laps),
            'learning_rate': laps[-1]['learning_rate'],
            'loss_scale': laps[-1]['loss_scale'],
            **parts.plan.speed(len(laps) / seconds, self._peak),
            'input_wait': min(waiting / seconds, 1.0),
            'seconds': seconds,
        }
        if parts.model.task.dtype != 'float16':
            del values['loss_scale']
        parts.progress.training(step, values)

    def save(self) -> float:
        """Starts saving the state in the background; the seconds that this held up the run."""
        parts, before = self.parts, time.monotonic()
        self._drain()
        saved = train_lib.to_saved(self.state)
        marks = jax.device_get(parts.programs.fingerprints(saved))
        about = {'step': self.step, 'config': dataclasses.asdict(parts.config)}
        record = checkpointing.signed(about, saved, marks)
        self._fingerprint = record['fingerprint']
        parts.log.sync()  # A checkpoint never outlives what was logged before it.
        parts.saver.save(compilation.on_host(saved), record)
        parts.watchdog.beat(f'the checkpoint of step {self.step}')
        return time.monotonic() - before

    def evaluate(self) -> dict[str, float] | None:
        """The quality on the whole evaluation set; None if the run was asked to stop."""
        parts, mesh = self.parts, self.parts.programs.mesh
        sums = evaluation.total(
            parts.programs.evaluate,
            self.state.variables,
            parts.pipeline.evaluation(),
            mesh,
            poll=parts.stop.poll,
            beat=lambda: parts.watchdog.beat(f'a batch of the evaluation at step {self.step}'),
        )
        return None if sums is None else parts.model.task.quality(sums)

    def _judge(self, at: Evaluation) -> bool | None:
        """Saves, evaluates and logs; whether the target is reached, None if asked to stop."""
        log, target = self.parts.log, self.parts.plan.target
        saving = self.save()
        before = time.monotonic()
        log.eval_start(at)
        result = self.evaluate()
        if result is None:
            return None
        if not math.isfinite(result[target.metric]):
            raise DivergedError(f'{target.words} is not finite at step {self.step}. {_DIVERGED}')
        # If a run was killed here, the log holds what it had found, and that counts.
        result[target.metric] = log.eval_stop(at, result[target.metric])
        times = {'eval_seconds': time.monotonic() - before, 'checkpoint_seconds': saving}
        self.parts.progress.evaluation(at, result | times, self._fingerprint)
        return processes.broadcast(target.is_met(result[target.metric]))

    def _log_speed(self, at: Evaluation, steps: int, seconds: float) -> None:
        plan = self.parts.plan
        speed = plan.speed(steps / seconds, self._peak)
        unit = plan.course.throughput_unit
        self.parts.log.tracked_stats(at, {**speed, 'throughput_unit': unit})

    def _blocks(self) -> Outcome:
        log = self.parts.log
        for at in self.parts.plan.evaluations:
            if at.step < self.step:
                continue
            log.block_start(at)
            first, before = self.step, time.monotonic()
            self.train_block(at.step)
            if self.step < at.step:
                self.save()
                return Outcome.INTERRUPTED
            log.block_stop(at)
            if first < at.step:  # Else a start before this one has logged it.
                self._log_speed(at, at.step - first, time.monotonic() - before)
            with self._clock.paused():
                reached = self._judge(at)
            if reached is None:
                return Outcome.INTERRUPTED
            if reached:
                return Outcome.REACHED
        return Outcome.MISSED

    def train_and_evaluate(self) -> Outcome:
        """Trains and evaluates in turns until the target, the last epoch or a request to stop."""
        parts = self.parts
        self._clock.lap()
        parts.progress.begin()
        parts.watchdog.start()
        try:
            outcome = self._blocks()
        finally:  # Whatever ended it, a checkpoint that is being written is still finished.
            saved = parts.saver.close()
            parts.trace.end(self.state)
            parts.progress.close()
            parts.watchdog.stop()
        saved = processes.broadcast(saved)
        if outcome is Outcome.INTERRUPTED and not saved:
            raise SaveError(
                f'the run was interrupted after step {self.step}, which could not be saved; the '
                'same command resumes from the checkpoint before it'
            )
        return outcome
