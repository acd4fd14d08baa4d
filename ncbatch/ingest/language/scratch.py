"""Columns of numbers in temporary files that have no name: gone when the process is."""

from __future__ import annotations

import tempfile
import weakref
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import OutputError


class Column:
    """Numbers of one type in a file in the system's folder for temporary files.

    Reading maps nothing, so that only what is read counts as memory of this process; several
    threads may read.

    Parameters
    ----------
    dtype : type
        The type of the numbers.
    """

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (as long as the column)
        except OSError as error:
            raise _no_room(error) from error
        self._lock = Lock()
        self._length = 0
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self._length

    def append(self, values: npt.NDArray[Any]) -> None:
        """Write numbers behind the last."""
        self.write(self._length, values)

    def write(self, start: int, values: npt.NDArray[Any]) -> None:
        """Write numbers from place `start` on.

        Raises
        ------
        OutputError
            When the disk is full.
        """
        left: Any = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8)
        with self._lock:
            self._file.seek(start * self.dtype.itemsize)
            try:
                while len(left):  # one call writes at most 2 GiB
                    left = left[self._file.write(left) :]
            except OSError as error:
                raise _no_room(error) from error
        self._length = max(self._length, start + len(values))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Read the numbers from place `start` to `stop`."""
        found = np.empty(max(min(stop, self._length) - start, 0), self.dtype)
        left: Any = found.view(np.uint8)
        with self._lock:
            self._file.seek(start * self.dtype.itemsize)
            while len(left):
                n = self._file.readinto(left)
                if not n:
                    raise OutputError("a temporary file of tokens is cut short")
                left = left[n:]
        return found

    def cut(self, length: int) -> None:
        """Forget what is behind the first `length` numbers."""
        self._length = min(self._length, length)


def _no_room(error: OSError) -> OutputError:
    return OutputError(
        f"tokens cannot be kept in a temporary file: {error.strerror}",
        "room for 8 bytes per token of the texts",
        "set TMPDIR to a folder with more room",
    )
