# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to the devices, and how long the loop waits for them."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from training import compilation


@dataclasses.dataclass
class Clock:
    """Where the seconds since the last report went."""

    since: float = dataclasses.field(default_factory=time.monotonic)
    waiting_for_input: float = 0.0

    def lap(self) -> tuple[float, float]:
        """Seconds in all, and of these waiting for input, since the last lap."""
        now = time.monotonic()
        seconds, waiting = now - self.since, self.waiting_for_input
        self.since, self.waiting_for_input = now, 0.0
        return max(seconds, 1e-9), waiting

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block does not count."""
        before = time.monotonic()
        yield
        self.since += time.monotonic() - before


def on_devices(batches: Iterator[Any], mesh: Mesh, clock: Clock) -> Iterator[Any]:
    """Batches on the devices, each sent while the one before it is used."""
    sent: collections.deque = collections.deque()
    exhausted = False
    while True:
        while not exhausted and len(sent) < 2:
            before = time.monotonic()
            batch = next(batches, None)
            clock.waiting_for_input += time.monotonic() - before
            exhausted = batch is None
            if batch is not None:
                sent.append(compilation.split(mesh, batch))
        if not sent:
            return
        yield sent.popleft()
