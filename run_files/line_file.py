# SPDX-License-Identifier: Apache-2.0
"""Files that a run appends lines to: each line is in the file at PATH, or the run ends."""

import errno
import os
from pathlib import Path

from settings.errors import SaveError


class LineFile:
    """A text file that only this process appends to, line by line.

    It is opened anew for every line, so that a file that was deleted, replaced or changed by
    somebody else is noticed at the next line.

    Args:
      path: is created if it is missing.
      size: bytes of it to keep; what follows them (half a line, after a kill) is cut off.

    Raises:
      SaveError: when it cannot be written; so do the methods.
    """

    def __init__(self, path: Path, size: int):
        self._path, self._size = path, size
        try:
            path.touch()
            os.truncate(path, size)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, line: str) -> None:
        """Appends a line; `line` has no newline."""
        data = f'{line}\n'.encode()
        try:
            with self._path.open('r+b') as file:
                found = file.seek(0, os.SEEK_END)
                if found != self._size:
                    raise self._changed(f'it has {found} bytes where the run left {self._size}')
                file.write(data)
        except FileNotFoundError:
            raise self._changed('it is gone') from None
        except OSError as error:
            raise self._failed(error) from error
        self._size += len(data)

    def rename(self, path: Path) -> None:
        """Puts the file in the place of another."""
        try:
            self._path.replace(path)
        except OSError as error:
            raise self._failed(error) from error
        self._path = path

    def sync(self) -> None:
        """Returns when the lines are on the disk, and not only with the operating system."""
        try:
            with self._path.open('rb') as file:
                os.fsync(file.fileno())
        except FileNotFoundError:
            raise self._changed('it is gone') from None
        except OSError as error:
            raise self._failed(error) from error

    def _changed(self, what: str) -> SaveError:
        return SaveError(
            f'{self._path} was deleted, replaced or changed while the run was writing it: {what}. '
            'Put the work directory back as it was and repeat the command, or start in a new one'
        )

    def _failed(self, error: OSError) -> SaveError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return SaveError(
                f'the disk is full: {self._path} cannot be written ({error.strerror}). Free some '
                'space; the same command then resumes from the last checkpoint'
            )
        return SaveError(
            f'{self._path} cannot be written ({error.strerror}). When it can, the same command '
            'resumes from the last checkpoint'
        )
