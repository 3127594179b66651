# SPDX-License-Identifier: Apache-2.0
"""How a run can end: the exit statuses, once, and the errors that carry them."""

import enum

REACHED, MISSED, REJECTED, FAILED, INTERRUPTED = 0, 1, 2, 3, 75


class RejectedError(Exception):
    """The run cannot begin as it was asked for; the text says why and what to do."""

    status = REJECTED


class FailedError(Exception):
    """The run cannot continue; its last checkpoint is kept, and the text says what to do."""

    status = FAILED


class ConfigError(RejectedError, ValueError):
    """A configuration that cannot be run; the text lists every error and what would be right."""


class DatasetError(RejectedError):
    """A data set that is missing or incomplete."""


class CheckpointError(RejectedError, ValueError):
    """A checkpoint or a file of weights that cannot be used; the text says which and why."""


class DataError(FailedError):
    """Data that turn out to be unusable; the text names them."""


class SaveError(FailedError):
    """Something that a run writes could not be written; the text names it."""


class Outcome(enum.Enum):
    """How a run ended that was not rejected and has not failed; its value is what people read."""

    REACHED = 'the target was reached'
    MISSED = 'the target was missed'
    INTERRUPTED = 'the run was interrupted and saved; the same command resumes it'

    @property
    def status(self) -> int:
        """The program's exit status."""
        return {
            Outcome.REACHED: REACHED,
            Outcome.MISSED: MISSED,
            Outcome.INTERRUPTED: INTERRUPTED,
        }[self]
