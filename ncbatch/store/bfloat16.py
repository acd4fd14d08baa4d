"""bfloat16 as a Zarr data type: stock zarr can neither create nor open it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError
from zarr.core.dtype.npy.float import BaseFloat

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """The Zarr v3 data type ``bfloat16``, in memory ``ml_dtypes.bfloat16``."""

    dtype_cls = type(_NATIVE)
    _zarr_v3_name = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """Make the data type from ``ml_dtypes.bfloat16``."""
        if dtype != _NATIVE:
            raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected {_NATIVE}")
        return cls()

    def to_native_dtype(self) -> Any:
        """Give the NumPy data type, which has no byte order to set."""
        return _NATIVE

    @property
    def item_size(self) -> int:
        """Two bytes."""
        return 2


def register() -> None:
    """Make zarr know bfloat16; needed once per process, harmless when repeated."""
    data_type_registry.register("bfloat16", BFloat16)
