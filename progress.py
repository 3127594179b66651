# SPDX-License-Identifier: Apache-2.0
"""What a run tells people: a progress line, WORKDIR/metrics.jsonl and TensorBoard events.

Process 0 alone reports. Metrics are examples and seconds of what was really done; nothing here
feeds back into the run.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plan import Plan

# tensorboardX imports PyTorch where it is installed, seconds for nothing that is used here.
_HIDDEN: dict[str, Any] = {} if 'torch' in sys.modules else {'torch': None}
sys.modules.update(_HIDDEN)
try:
    from tensorboardX import SummaryWriter
finally:
    for _name in _HIDDEN:
        del sys.modules[_name]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f'{hours}:{rest // 60:02}:{rest % 60:02}'


class Progress:
    """Writes and shows a run's metrics.

    Args:
      workdir: where to write; None for the processes that do not.
      plan: the run's.
      first_step: the step that the run starts or goes on from; later lines are dropped, for they
        are about to be written again.
    """

    def __init__(self, workdir: Path | None, plan: Plan, first_step: int):
        self._plan = plan
        self._quiet = workdir is None
        self._terminal = sys.stdout.isatty()
        self._started, self._first_step = time.monotonic(), first_step
        if workdir is None:
            return
        path = workdir / 'metrics.jsonl'
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _is_before(line, first_step)]
            whole = path.with_suffix('.part')  # A kill in between must not cost the file.
            whole.write_text(''.join(f'{line}\n' for line in lines))
            whole.replace(path)
        self._file = path.open('a')
        self._events = SummaryWriter(str(workdir / 'tensorboard'), purge_step=first_step + 1)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        line = {'step': step, 'epoch': round(self._plan.epoch(step), 4)} | dict(values)
        self._file.write(json.dumps(line) + '\n')
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line for people."""
        if not self._quiet:
            clear = '\r\x1b[K' if self._terminal else ''
            print(f'{clear}{text}', flush=True)

    def training(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of the training steps since the last call."""
        if self._quiet:
            return
        self._write(step, values)
        pace = (time.monotonic() - self._started) / max(step - self._first_step, 1)
        text = (
            f'epoch {self._plan.epoch(step):6.2f}  step {step}/{self._plan.total_steps}  '
            f'loss {values["loss"]:.4f}  rate {values["learning_rate"]:.4g}  '
            f'{values["images_per_second"]:,.0f} images/s  '
            f'at most {_duration(pace * (self._plan.total_steps - step))} left'
        )
        if self._terminal:
            print(f'\r\x1b[K{text}', end='', flush=True)
        else:
            print(text, flush=True)

    def evaluation(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """The result of an evaluation."""
        if self._quiet:
            return
        self._write(step, values)
        self.say(
            f'epoch {epoch:6}  step {step}  evaluation: '
            f'top-1 {values["eval_top1"]:.5f}, loss {values["eval_loss"]:.4f}'
        )

    def close(self) -> None:
        """Ends the files."""
        if not self._quiet:
            self._file.close()
            self._events.close()


def _is_before(line: str, step: int) -> bool:
    try:
        values = json.loads(line)
        # The evaluation that follows a step is done again by a run that goes on from there.
        return values['step'] < step or (values['step'] == step and 'eval_top1' not in values)
    except (ValueError, KeyError):  # Half a line that a killed process left.
        return False
