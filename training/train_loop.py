# SPDX-License-Identifier: Apache-2.0
"""One run, from its configuration to its last log line.

    judge what is there → init_start → compile, initialise → init_stop, run_start → train and
    evaluate in turns → run_stop

Whatever can be rejected is rejected before anything is written.

The device is never made to wait for Python: the next step is dispatched before the last one's
metrics are read, and batches are on their way to the device while it computes.
"""

import collections
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import optax

import train_lib
from input_pipeline import Pipeline
from run_files import banner, log_check, work_directory
from run_files.mlperf_log import EventLog
from run_files.profiling import Trace
from run_files.progress import Progress
from settings.errors import FailedError, Outcome, SaveError
from settings.hyperparameters import Config
from settings.plan import Dataset, Evaluation, Plan
from train_lib import Programs, Task, TrainState
from training import evaluation, processes, start
from training.checkpoint_saver import CheckpointSaver
from training.device_feed import Clock, on_devices
from training.start import Start
from training.stop_request import StopRequest
from training.watchdog import Watchdog
from training.workload import Workload, plan_of


class NonFiniteError(FailedError):
    """A loss or a gradient is not finite: training has diverged."""


_DIVERGED = (
    'Training has diverged, maybe some steps before; the same command would come to the same step. '
    'Start in a new work directory, with a lower learning_rate, a longer warm-up or another seed'
)


@dataclasses.dataclass(frozen=True)
class Model:
    """What a run trains, before anything is compiled."""

    task: Task
    optimizer: optax.MultiSteps
    schedule: optax.Schedule
    head: tuple[str, ...]

    @classmethod
    def of(cls, workload: Workload, config: Config, plan: Plan, dataset: Dataset) -> 'Model':
        """The model of a run."""
        transformation, schedule = workload.optimizer(config, plan)
        optimizer = train_lib.accumulated(transformation, plan.accumulation_steps)
        return cls(workload.task(config, dataset), optimizer, schedule, workload.head)

    @property
    def template(self) -> TrainState:
        """The run's state, as shapes and dtypes."""
        return train_lib.abstract_state(self.task, self.optimizer)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of once it is set up; only process 0 has a saver."""

    config: Config
    plan: Plan
    model: Model
    programs: Programs
    pipeline: Pipeline
    log: EventLog
    progress: Progress
    saver: CheckpointSaver | None
    stop: StopRequest
    trace: Trace
    watchdog: Watchdog


class Run:
    """A run in one process: where it stands, and how it moves on. Use `train_and_evaluate`."""

    def __init__(self, parts: Parts, state: TrainState):
        self.parts, self.state = parts, state
        self.step = int(jax.device_get(state.step))
        self._pending: collections.deque = collections.deque()
        self._laps: list[Mapping[str, float]] = []
        self._clock = Clock()
        self._stopped = False

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
            metrics = []
            for _ in range(micro_steps):
                self.state, values = parts.programs.train(self.state, next(batches))
                metrics.append(values)
            self.step += 1
            self._pending.append((self.step, metrics, parts.stop.poll()))
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
        means = {name: float(np.mean([m[name] for m in micro])) for name in micro[0]}
        means |= {name: float(micro[-1][name]) for name in ('learning_rate', 'loss_scale')}
        if means['finite'] < 1:
            raise NonFiniteError(
                f'the loss ({means["loss"]}) or its gradient is not finite at step {step}; that '
                f'step moved no weight. {_DIVERGED}'
            )
        self.parts.watchdog.beat(f'step {step}')
        self._stopped = self._stopped or bool(stop)
        self._laps.append(means)
        if step % self.parts.config.log_every_steps == 0:
            self._report(step)

    def _report(self, step: int) -> None:
        parts = self.parts
        seconds, waiting = self._clock.lap()
        laps, self._laps = self._laps, []
        metrics = [name for name in laps[0] if name not in train_lib.OWN_METRICS]
        values = {name: float(np.mean([lap[name] for lap in laps])) for name in metrics}
        values |= {
            'learning_rate': laps[-1]['learning_rate'],
            'examples_per_second': len(laps) * parts.plan.global_batch_size / seconds,
            'input_wait': min(waiting / seconds, 1.0),
            'seconds': seconds,
        }
        if parts.model.task.dtype == 'float16':
            values['loss_scale'] = laps[-1]['loss_scale']
        parts.progress.training(step, values)

    def save(self) -> float:
        """Starts saving the state in the background; the seconds that this held up the run."""
        parts, before = self.parts, time.monotonic()
        self._drain()
        if parts.saver:
            tree = jax.device_get(train_lib.to_saved(self.state))
            if jax.default_backend() == 'cpu':  # It is the memory that the next step overwrites.
                tree = jax.tree.map(np.array, tree)
            parts.log.sync()  # A checkpoint never outlives what was logged before it.
            parts.saver.save(tree, {'step': self.step, 'config': dataclasses.asdict(parts.config)})
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
        # If a run was killed here, the log holds what it had found, and that counts.
        result[target.metric] = log.eval_stop(at, result[target.metric])
        times = {'eval_seconds': time.monotonic() - before, 'checkpoint_seconds': saving}
        self.parts.progress.evaluation(at, result | times)
        return processes.broadcast(target.is_met(result[target.metric]))

    def _blocks(self) -> Outcome:
        log = self.parts.log
        for at in self.parts.plan.evaluations:
            if at.step < self.step:
                continue
            log.block_start(at)
            self.train_block(at.step)
            if self.step < at.step:
                self.save()
                return Outcome.INTERRUPTED
            log.block_stop(at)
            with self._clock.paused():
                reached = self._judge(at)
            if reached is None:
                return Outcome.INTERRUPTED
            if reached:
                return Outcome.REACHED
        return Outcome.MISSED

    def finish(self) -> Outcome:
        """Trains and evaluates in turns until the target, the last epoch or a request to stop."""
        parts, saved = self.parts, True
        self._clock.lap()
        parts.progress.begin()
        parts.watchdog.start()
        try:
            outcome = self._blocks()
        finally:  # Whatever ended it, a checkpoint that is being written is still finished.
            if parts.saver:
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


def set_up(
    workload: Workload,
    config: Config,
    plan: Plan,
    dataset: Dataset,
    model: Model,
    workdir: Path,
    log: EventLog,
    begin: Start,
    profile: tuple[int, int] | None = None,
) -> Run:
    """Compiles a run's programs, and puts the state that it starts from on the devices."""
    template, step = model.template, begin.found.step
    progress = processes.run_on_lead(lambda: Progress(workdir, plan, step)) or Progress(
        None, plan, 0
    )
    saver = processes.run_on_lead(
        lambda: CheckpointSaver(workdir / 'checkpoints', progress.say, begin.found.damaged)
    )
    for line in banner.lines(config, plan, dataset.digest, template.variables, workdir, step):
        progress.say(line)
    before = time.monotonic()
    progress.say('compiling …')
    mesh = train_lib.make_mesh()
    programs = train_lib.compile_steps(
        model.task, model.optimizer, model.schedule, plan.micro_batch, mesh
    )
    progress.say(f'compiled in {time.monotonic() - before:.1f} s')
    assert config.seed is not None
    share = processes.local_share(mesh, plan.micro_batch)
    parts = Parts(
        config=config,
        plan=plan,
        model=model,
        programs=programs,
        pipeline=workload.pipeline(config, dataset, config.seed, share),
        log=log,
        progress=progress,
        saver=saver,
        stop=StopRequest(mesh),
        trace=Trace(workdir / 'profile', profile if saver else None, progress.say),
        watchdog=Watchdog(config.stall_seconds),
    )
    tree = processes.run_on_lead(
        lambda: begin.saved(config, model.task, model.optimizer, model.head)
    ) or jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), train_lib.to_saved(template))
    state = train_lib.from_saved(processes.broadcast_from_lead(tree), template)
    return Run(parts, train_lib.replicate(mesh, state))


def train_and_evaluate(
    workload: Workload,
    config: Config,
    dataset: Dataset,
    workdir: Path,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Runs a configuration to its end, or resumes what the work directory holds.

    Args:
      workload: what is trained.
      config: resolved; without a seed, one is drawn from the system's entropy.
      dataset: what it trains on.
      workdir: where everything that it writes goes.
      profile: optimizer steps [start, stop) to trace (see profiling.Trace).

    Raises:
      RejectedError: before anything is written.
      FailedError: later; the last checkpoint is kept.
    """
    plan = plan_of(workload, config, dataset, jax.device_count())
    model = Model.of(workload, config, plan, dataset)
    template = model.template
    is_new = not (workdir / 'config.json').exists()
    weights = processes.run_on_lead(
        lambda: start.read_weights(config, template, model.head) if is_new else None
    )
    recorded = processes.run_on_lead(lambda: work_directory.open_for(config, dataset, workdir))
    seed = processes.seed_from_lead(config.seed if recorded is None else recorded)
    config = dataclasses.replace(config, seed=seed)
    log = processes.run_on_lead(lambda: EventLog(workdir / 'mlperf.log')) or EventLog(None)
    processes.run_on_lead(lambda: log_check.check(log, config, plan, 0))
    status = processes.broadcast(log.status)
    if status:
        return Outcome.REACHED if status == 'success' else Outcome.MISSED
    begin = processes.run_on_lead(
        lambda: start.read(config, plan, template, model.head, workdir, log, weights)
    )
    processes.run_on_lead(lambda: work_directory.record(config, dataset, workdir))

    log.cache_clear(config.drop_page_cache)
    log.init_start()
    log.header(config, plan)
    run = set_up(
        workload, config, plan, dataset, model, workdir, log, begin or start.NOTHING, profile
    )
    del begin  # Its arrays are on the devices now.
    log.init_stop()
    log.run_start()
    run.parts.stop.listen()
    outcome = run.finish()
    if outcome is not Outcome.INTERRUPTED:
        processes.run_on_lead(lambda: work_directory.check_still_there(workdir))
        log.run_stop(outcome is Outcome.REACHED)
    return outcome
