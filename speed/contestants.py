# SPDX-License-Identifier: Apache-2.0
"""Contestants: programs that measure in turns, each in a process of its own.

A contestant prints facts about itself as a line of JSON when it is ready. Then it answers every
line of its input, `COMMAND NUMBER`, with a line of JSON, and is idle in between.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from run_files.machine import describe

ROOT = Path(__file__).resolve().parents[1]


class Contestant:
    """A contestant's process, as the program that asks it sees it.

    Several get ready at the same time: only who wants a contestant's facts waits for it.

    Args:
      module: it is started as `python -m MODULE ARGUMENTS`, in the root of the repository.
      python: the interpreter.
      environment: variables beside those of this process.

    Attributes:
      facts: what it says of itself when it is ready. RuntimeError: the process has ended; so it
        is with `ask`.
    """

    def __init__(
        self, module: str, *arguments: str, python: str = sys.executable, **environment: str
    ):
        self._module = module
        self._process = subprocess.Popen(
            [python, '-m', module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )

    @functools.cached_property
    def facts(self) -> dict[str, Any]:  # noqa: D102
        facts: dict[str, Any] = self._answer()
        return facts

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f'{self._module} ended with status {self._process.wait()}')
        return json.loads(line)

    def ask(self, command: str, number: int = 0) -> Any:
        """Runs a command; its answer."""
        _ = self.facts  # Comes first.
        print(command, number, file=self._process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        self._process.communicate()


Commands = Mapping[str, Callable[[int], Any]]  # Functions of a number that return JSON, by name.


def serve(create: Callable[[], tuple[Mapping[str, Any], Commands]]) -> None:
    """Answers what this process is asked, until its input ends.

    Args:
      create: makes the contestant and warms it up, which takes facts['ready'] seconds; its facts,
        JSON, and its commands.
    """
    answers, before = sys.stdout, time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # What libraries print is no answer.
        facts, commands = create()
        facts = {'ready': time.perf_counter() - before, **facts}
        print(json.dumps(facts), file=answers, flush=True)
        for line in sys.stdin:
            command, number = line.split()
            print(json.dumps(commands[command](int(number))), file=answers, flush=True)


def machine() -> str:
    """What is measured on: processor and GPUs, usable cores, their load, and the date."""
    here = describe()
    parts = [here['processor'], f'{here["usable_cores"]} cores', *here['gpus']]
    return ', '.join([*parts, f'load {os.getloadavg()[0]:.1f}', time.strftime('%Y-%m-%d')])
