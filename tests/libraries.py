"""The array libraries that every numeric test body runs over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ncbatch.arrays.namespace import to_numpy


@dataclass(frozen=True)
class Library:
    """An array library, and how to put a NumPy array on its device."""

    name: str
    put: Callable[[np.ndarray], Any]

    def host(self, values: Any) -> np.ndarray:
        return to_numpy(values)

    def __str__(self) -> str:
        return self.name


def _strict(values: np.ndarray) -> Any:
    # The fake device refuses to be mixed with host arrays, as a GPU's would.
    strict = pytest.importorskip("array_api_strict")
    return strict.asarray(np.asarray(values), device=strict.Device("device1"))


def _torch(values: np.ndarray) -> Any:
    return pytest.importorskip("torch").from_numpy(np.array(values))


def _cupy(values: np.ndarray) -> Any:
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.runtime.getDeviceCount() == 0:
        pytest.skip("no CUDA device")
    return cupy.asarray(values)


NUMPY = Library("numpy", lambda values: values)
LIBRARIES = [
    NUMPY,
    Library("array_api_strict", _strict),
    Library("torch", _torch),
    pytest.param(Library("cupy", _cupy), marks=pytest.mark.gpu),
]

each_library = pytest.mark.parametrize("library", LIBRARIES, ids=str)
