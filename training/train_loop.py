# SPDX-License-Identifier: Apache-2.0
"""One run, from its configuration to its last log line.

    judge what is there → init_start → compile, initialise → init_stop, run_start → train and
    evaluate in turns → run_stop

Whatever can be rejected is rejected before anything is written.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

import train_lib
from run_files import banner, log_check, work_directory
from run_files.mlperf_log import EventLog
from run_files.profiling import Trace
from run_files.progress import Progress
from run_files.terminal import show
from settings.errors import Outcome
from settings.hyperparameters import Config
from settings.plan import Dataset, Plan
from train_lib import Model
from training import compilation, processes, restoring, start
from training.checkpoint_saver import CheckpointSaver
from training.restoring import Found
from training.run import Parts, Run
from training.stop_request import StopRequest
from training.watchdog import Watchdog
from training.workload import Workload, model_of, plan_of


@compilation.without_garbage_collector()
def set_up(
    workload: Workload,
    config: Config,
    plan: Plan,
    dataset: Dataset,
    model: Model,
    workdir: Path,
    log: EventLog,
    found: Found,
    mesh: Mesh,
    profile: tuple[int, int] | None = None,
) -> Run:
    """Compiles a run's programs, and puts the state that it starts from on the devices."""
    template, step = train_lib.abstract_state(model), found.step
    shown = processes.run_on_lead(lambda: Progress(workdir, plan, step))
    progress = shown or Progress(None, plan, 0)
    saver = CheckpointSaver(workdir / 'checkpoints', reporter(progress), found.damaged)
    about = (dataset.digest, template.variables, workload.particulars(config))
    for line in banner.lines(config, plan, *about, workdir, step, found.fingerprint):
        progress.say(line)
    before = time.monotonic()
    progress.say('compiling …')
    programs = compilation.compile_steps(model, plan.micro_batch_size, mesh, progress.busy)
    progress.say(f'compiled in {time.monotonic() - before:.1f} s')
    assert config.seed is not None
    share = processes.local_share(mesh, plan.micro_step_size)
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
        trace=Trace(workdir / 'profile', profile if processes.is_lead() else None, progress.say),
        watchdog=Watchdog(config.stall_seconds),
    )
    with progress.busy('putting the state on the devices'):
        return Run(parts, start.state(found, config, model, mesh))


def reporter(progress: Progress) -> Callable[[str], None]:
    """Shows what any process has to report; the progress is process 0's alone."""
    if processes.is_lead():
        return progress.say
    return lambda text: show(f'process {jax.process_index()}: {text}')


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
    model = model_of(workload, config, plan, dataset)
    template = train_lib.abstract_state(model)
    is_new = processes.broadcast(not os.path.exists(workdir / 'config.json'))
    if is_new:
        processes.run_on_lead(lambda: start.check_weights(config, template, workload.head))
    recorded = processes.run_on_lead(lambda: work_directory.open_for(config, dataset, workdir))
    processes.check_all_see(workdir)
    seed = processes.seed_from_lead(config.seed if recorded is None else recorded)
    config = dataclasses.replace(config, seed=seed)
    log = processes.run_on_lead(lambda: EventLog(workdir / 'mlperf.log')) or EventLog(None)
    processes.run_on_lead(lambda: log_check.check(log, config, plan, 0))
    status = processes.broadcast(log.status)
    if status:
        return Outcome.REACHED if status == 'success' else Outcome.MISSED
    mesh = compilation.make_mesh()
    found = restoring.find(workdir / 'checkpoints', model, mesh)
    step = found.step
    processes.run_on_lead(
        lambda: start.check(step, config, plan, template, workload.head, log, is_new)
    )
    processes.run_on_lead(lambda: work_directory.record(config, dataset, workdir))

    log.cache_clear(config.drop_page_cache)
    log.init_start()
    log.header(config, plan)
    run = set_up(workload, config, plan, dataset, model, workdir, log, found, mesh, profile)
    processes.wait_for_all()  # One may have compiled for longer than the others.
    log.init_stop()
    log.run_start()
    run.parts.stop.listen()
    outcome = run.train_and_evaluate()
    if outcome is not Outcome.INTERRUPTED:
        processes.run_on_lead(lambda: work_directory.check_still_there(workdir))
        log.run_stop(outcome is Outcome.REACHED)
    return outcome
