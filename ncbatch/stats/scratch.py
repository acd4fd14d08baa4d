"""Scratch: memory that folds use one after another, so that each need not have its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Scratch:
    """Arrays by name, made when they are first wanted and again where more is wanted.

    What is written to one lasts until the next fold takes it: folds that share a scratch must not
    run at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[Any]] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: Any, *, fill: int | None = None
    ) -> npt.NDArray[Any]:
        """Give an array in memory that an earlier taker of the name may have written to.

        Parameters
        ----------
        name : str
            Which.
        shape : tuple of int
            Its shape.
        dtype : dtype
            Its dtype; another one than before takes new memory.
        fill : int, optional
            What new memory is filled with; by default it is not.
        """
        size = int(np.prod(shape, dtype=np.int64))
        found = self._buffers.get(name)
        if found is None or found.dtype != dtype or found.size < size:
            self._buffers.pop(name, None)
            del found  # before the larger one is made
            found = np.empty(size, dtype) if fill is None else np.full(size, fill, dtype)
            self._buffers[name] = found
        return found[:size].reshape(shape)
