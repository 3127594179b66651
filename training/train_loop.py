# SPDX-License-Identifier: Apache-2.0
"""One run, from its configuration to its last log line.

    judge what is there → init_start → compile, initialise → init_stop, run_start → train and
    evaluate in turns → run_stop

Whatever can be rejected is rejected before anything is written.

The device is never made to wait for Python: the next step is dispatched before the last one's
metrics are read, and batches are on their way to the device while it computes.
"""

import collections
import enum
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

import train_lib
from input_pipeline import Dataset, Pipeline
from run_files import banner, log_check, work_directory
from run_files.line_file import SaveError
from run_files.mlperf_log import EventLog
from run_files.profiling import Trace
from run_files.progress import Progress
from settings.plan import Evaluation, Plan, make_plan
from train_lib import TrainState
from training import checkpointing, processes, start
from training.device_feed import Clock, on_devices
from training.processes import StopRequest
from training.watchdog import Watchdog
from workloads.resnet import optimizers
from workloads.resnet.task import ImageClassification


class Outcome(enum.Enum):
    """How a run ended."""

    REACHED = 'the target was reached'
    MISSED = 'the target was missed'
    INTERRUPTED = 'the run was interrupted and saved; the same command resumes it'


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite: training has diverged."""


_DIVERGED = (
    'Training has diverged, maybe some steps before; the same command would come to the same step. '
    'Start in a new work directory, with a lower learning_rate, a longer warm-up or another seed'
)


class Run:
    """A run in one process: what it has and how it moves on. Use `train_and_evaluate`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        plan: Plan,
        dataset: Dataset,
        workdir: Path,
        log: EventLog,
        stop: StopRequest,
        trace: Trace,
        begin: start.Start = start.NOTHING,
    ):
        self.config, self.plan, self.log, self.stop = config, plan, log, stop
        self.trace, self._workdir = trace, workdir
        mesh = train_lib.make_mesh()
        self.task = ImageClassification(config, dataset.num_classes)
        optimizer = optimizers.create(config, plan)
        template = start.template(self.task, optimizer)
        self.progress = processes.lead_does(
            lambda: Progress(workdir, plan, begin.found.step)
        ) or Progress(None, plan, 0)
        trace.report = self.progress.say
        self.checkpoints = processes.lead_does(
            lambda: checkpointing.Checkpoints(
                workdir / 'checkpoints', self.progress.say, begin.found.damaged
            )
        )
        for line in banner.lines(
            config, plan, dataset, template.variables, workdir, begin.found.step
        ):
            self.progress.say(line)
        schedule = optimizers.learning_rate_schedule(config, plan)
        self.rates = np.asarray(jax.jit(schedule)(np.arange(plan.total_steps)))
        self.programs = self._compile(optimizer, mesh)
        share = processes.share_of(mesh, plan.micro_batch)
        self.pipeline = Pipeline(dataset, config, config['seed'], share)
        self.state = self._first_state(optimizer, template, begin)
        self.step = int(jax.device_get(self.state.step))
        self.watchdog = Watchdog(config['stall_seconds'])
        self._pending: collections.deque = collections.deque()
        self._laps: list[Mapping[str, float]] = []
        self._clock = Clock()
        self._stopped = False

    def _compile(self, optimizer: Any, mesh: Any) -> train_lib.Programs:
        before = time.monotonic()
        self.progress.say('compiling …')
        programs = train_lib.compile_steps(self.task, optimizer, self.plan.micro_batch, mesh)
        self.progress.say(f'compiled in {time.monotonic() - before:.1f} s')
        return programs

    def _first_state(self, optimizer: Any, template: TrainState, begin: start.Start) -> TrainState:
        """Process 0's state to start from, on all devices."""
        tree = processes.lead_does(lambda: begin.tree(self.config, self.task, optimizer))
        if tree is None:
            shapes = checkpointing.to_tree(template)
            tree = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        return self.programs.to_all(checkpointing.from_tree(processes.from_lead(tree), template))

    def train_block(self, last_step: int) -> None:
        """Trains up to a step, or until the run is asked to stop."""
        micro_steps = self.plan.accumulation_steps
        batches = on_devices(
            self.pipeline.train(self.step * micro_steps, last_step * micro_steps),
            self.programs,
            self._clock,
        )
        while self.step < last_step and not self._stopped:
            self.trace.at(self.step, self.state)
            metrics = []
            for _ in range(micro_steps):
                flags = self.stop.flags(self.programs)
                self.state, values = self.programs.train(self.state, next(batches), flags)
                metrics.append(values)
            self.step += 1
            self._pending.append((self.step, metrics))
            if len(self._pending) > 1:
                self._read_metrics()
            every = self.config['checkpoint_every_steps']
            if every and self.step % every == 0 and self.step < last_step:
                self.save()
        self._drain()
        self.trace.end(self.state)

    def _drain(self) -> None:
        while self._pending:
            self._read_metrics()

    def _read_metrics(self) -> None:
        """Reads the metrics of the oldest step in flight, which waits for it to end."""
        step, micro = self._pending.popleft()
        micro = jax.device_get(micro)
        means = {name: float(np.mean([m[name] for m in micro])) for name in micro[0]}
        if means['finite'] < 1:
            raise NonFiniteError(
                f'the loss ({means["loss"]}) or its gradient is not finite at step {step}; that '
                f'step moved no weight. {_DIVERGED}'
            )
        self.watchdog.beat(f'step {step}')
        self._stopped = self._stopped or means['stop'] > 0
        self._laps.append(means)
        if step % self.config['log_every_steps'] == 0:
            self._report(step)

    def _report(self, step: int) -> None:
        seconds, waiting = self._clock.lap()
        laps, self._laps = self._laps, []
        values = {
            'loss': float(np.mean([lap['loss'] for lap in laps])),
            'top1': float(np.mean([lap['top1'] for lap in laps])),
            'learning_rate': float(self.rates[step - 1]),
            'images_per_second': len(laps) * self.plan.global_batch_size / seconds,
            'input_wait': min(waiting / seconds, 1.0),
            'seconds': seconds,
        }
        if self.config['dtype'] == 'float16':
            values['loss_scale'] = laps[-1]['loss_scale']
        self.progress.training(step, values)

    def save(self) -> float:
        """Starts saving the state in the background; the seconds that this held up the run."""
        before = time.monotonic()
        self._drain()
        if self.checkpoints:
            tree = jax.device_get(checkpointing.to_tree(self.state))
            if jax.default_backend() == 'cpu':  # It is the memory that the next step overwrites.
                tree = jax.tree.map(np.array, tree)
            self.log.sync()  # A checkpoint never outlives what was logged before it.
            self.checkpoints.save(tree, {'step': self.step, 'config': dict(self.config)})
        self.watchdog.beat(f'the checkpoint of step {self.step}')
        return time.monotonic() - before

    def evaluate(self) -> dict[str, float] | None:
        """The quality on the whole evaluation set; None if the run was asked to stop."""
        totals: dict[str, float] = collections.defaultdict(float)
        pending: collections.deque = collections.deque()

        def read():
            sums, stop = jax.device_get(pending.popleft())
            self._stopped = self._stopped or stop > 0
            for name, value in sums.items():
                totals[name] += value.item()
            self.watchdog.beat(f'a batch of the evaluation at step {self.step}')

        for batch in on_devices(self.pipeline.evaluation(), self.programs, Clock()):
            flags = self.stop.flags(self.programs)
            pending.append(self.programs.evaluate(self.state.variables, batch, flags))
            if len(pending) > 2:
                read()
            if self._stopped:
                return None
        while pending:
            read()
        return self.task.quality(totals)

    def _judge(self, evaluation: Evaluation) -> bool | None:
        """Saves, evaluates and logs; whether the target is reached, None if asked to stop."""
        paused = time.monotonic()
        saving = self.save()
        before = time.monotonic()
        self.log.eval_start(evaluation)
        result = self.evaluate()
        if result is None:
            return None
        # If a run was killed here, the log holds what it had found, and that counts.
        result['eval_top1'] = self.log.eval_stop(evaluation, result['eval_top1'])
        result |= {'eval_seconds': time.monotonic() - before, 'checkpoint_seconds': saving}
        self.progress.evaluation(self.step, evaluation.epoch, result)
        self._clock.since += time.monotonic() - paused  # None of this is time spent on training.
        reached = result['eval_top1'] >= self.config['target_top1']
        return bool(processes.from_lead(np.int32(reached)))

    def _blocks(self) -> Outcome:
        for evaluation in self.plan.evaluations:
            if evaluation.step < self.step:
                continue
            self.log.block_start(evaluation)
            self.train_block(evaluation.step)
            if self.step < evaluation.step:
                self.save()
                return Outcome.INTERRUPTED
            self.log.block_stop(evaluation)
            reached = self._judge(evaluation)
            if reached is None:
                return Outcome.INTERRUPTED
            if reached:
                return Outcome.REACHED
        return Outcome.MISSED

    def to_the_end(self) -> Outcome:
        """Trains and evaluates in turns until the target, the last epoch or a request to stop."""
        self._clock.lap()
        self.progress.begin()
        self.watchdog.start()
        saved = True
        try:
            outcome = self._blocks()
        finally:  # Whatever ended it, a checkpoint that is being written is still finished.
            if self.checkpoints:
                saved = self.checkpoints.close()
            self.trace.end(self.state)
            self.progress.close()
            self.watchdog.stop()
        if outcome is not Outcome.INTERRUPTED:
            processes.lead_does(lambda: work_directory.check_still_there(self._workdir))
            self.log.run_stop(outcome is Outcome.REACHED)
        elif not saved:
            raise SaveError(
                f'the run was interrupted after step {self.step}, which could not be saved; the '
                'same command resumes from the checkpoint before it'
            )
        return outcome


def train_and_evaluate(
    config: Mapping[str, Any],
    dataset: Dataset,
    workdir: Path,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Runs a configuration to its end, or resumes what the work directory holds.

    Args:
      config: resolved; without a seed, one is drawn from the system's entropy.
      dataset: what it trains on.
      workdir: where everything that it writes goes.
      profile: optimizer steps [start, stop) to trace (see profiling.Trace).

    Raises:
      ConfigError, WorkDirectoryError, CheckpointError, LogError: before anything is written.
      DataError, NonFiniteError, SaveError: later; the last checkpoint is kept.
    """
    plan = make_plan(
        config,
        num_train=dataset.num_train,
        num_eval=dataset.num_eval,
        num_devices=jax.device_count(),
    )
    is_new = not (workdir / 'config.json').exists()
    weights = processes.lead_does(
        lambda: start.read_weights(config, plan, dataset) if is_new else None
    )
    recorded = processes.lead_does(lambda: work_directory.open_for(config, dataset, workdir))
    seed = processes.seed_from_lead(config['seed'] if recorded is None else recorded)
    config = FrozenConfigDict(dict(config) | {'seed': seed})
    log = processes.lead_does(lambda: EventLog(workdir / 'mlperf.log')) or EventLog(None)
    processes.lead_does(lambda: log_check.check(log, config, plan, 0))
    ended = [None, 'success', 'aborted']
    status = ended[int(processes.from_lead(np.int32(ended.index(log.status))))]
    if status:
        return Outcome.REACHED if status == 'success' else Outcome.MISSED
    begin = processes.lead_does(lambda: start.read(config, plan, dataset, workdir, log, weights))
    processes.lead_does(lambda: work_directory.record(config, dataset, workdir))

    log.cache_clear(config['drop_page_cache'])
    log.init_start()
    log.header(config, plan)
    stop = StopRequest()
    trace = Trace(workdir / 'profile', profile if processes.is_lead() else None)
    run = Run(config, plan, dataset, workdir, log, stop, trace, begin or start.NOTHING)
    del begin  # Its arrays are on the devices now.
    log.init_stop()
    log.run_start()
    stop.listen()
    return run.to_the_end()
