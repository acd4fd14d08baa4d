"""Store format 1: its names, dtypes and chunk shapes, and what a store says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError
from zarr.core.dtype.npy.float import BaseFloat

from ncbatch.errors import StoreError, UsageError

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """The Zarr v3 data type ``bfloat16``, in memory ``ml_dtypes.bfloat16``.

    Stock zarr can neither create nor open it.
    """

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
        """Return the NumPy data type, which has no byte order to set."""
        return _NATIVE

    @property
    def item_size(self) -> int:
        """Two bytes."""
        return 2


# Needed once per process: zarr 3.1.6 does not load the entry point that names the class.
data_type_registry.register("bfloat16", BFloat16)

FORMAT = 1
ATTRIBUTE = "ncbatch"
CLASSIFIER = "classifier"
# In the attributes of a complete split: the arrays that it must have.
ARRAYS = "arrays"
# Begins the name of what replaces something complete, until it is complete itself.
STAGED = "."
# Labels are int32.
MAX_CLASSES = 2**31 - 1
# A chunk holds the largest power of two of rows within this many bytes: 8 to 16 MiB.
CHUNK_BYTES = 16 * 2**20
# Small rows would make label chunks, the unit of commitment, needlessly large.
MAX_CHUNK_ROWS = 2**20

DTYPES: Mapping[str, npt.DTypeLike] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}


@dataclass(frozen=True)
class LayerSpec:
    """Width D and stored dtype of a layer's features."""

    n_features: int
    dtype: str

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Make it from what JSON holds of it."""
        return cls(int(record["n_features"]), str(record["dtype"]))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.n_features * self.numpy_dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype in memory."""
        return np.dtype(DTYPES[self.dtype])


def read_attributes(group: zarr.Group) -> dict[str, Any]:
    """Return what this package has recorded in a group's attributes; empty where it has not."""
    record = group.attrs.get(ATTRIBUTE)
    return record if isinstance(record, dict) else {}


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return the key that sorts names by the numbers in them, as a person counts.

    Examples
    --------
    >>> sorted(["h.10", "h.2"], key=natural_key)
    ['h.2', 'h.10']
    """
    parts = re.split(r"(\d+)", name)
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in parts]


def layer_specs(layers: Mapping[str, int], dtype: str) -> dict[str, LayerSpec]:
    """Check names, widths and dtype of `layers`.

    Raises
    ------
    UsageError
        For an unknown dtype, a width below 1, or a name that cannot be a path's part.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}'", "one of: " + ", ".join(DTYPES))
    for name, width in layers.items():
        check_name("layer", name)
        if width < 1:
            raise UsageError(f"layer '{name}' with {width} features", "at least 1")
    return {name: LayerSpec(int(width), dtype) for name, width in layers.items()}


def check_name(kind: str, name: str) -> None:
    """Refuse names that cannot be one part of a path.

    Raises
    ------
    UsageError
        For an empty name, one with ``/``, one that starts with ``.`` or ``__``, or a reserved one.
    """
    if not name or "/" in name or name.startswith((".", "__")):
        raise UsageError(
            f"{kind} name '{name}'", "a name without '/', not starting with '.' or '__'"
        )
    if kind == "split" and name == CLASSIFIER:
        raise UsageError(f"split name '{name}'", "another name: this one holds the classifiers")


def chunk_rows(spec: LayerSpec, n_samples: int | None = None) -> int:
    """Choose the rows of a chunk over the full D.

    Parameters
    ----------
    spec : LayerSpec
        The layer.
    n_samples : int, optional
        Rows of the split, where known.

    Returns
    -------
    int
        A power of two: 8 to 16 MiB, fewer rows for a split that needs no more.

    Examples
    --------
    >>> chunk_rows(LayerSpec(768, "float16"))
    8192
    >>> chunk_rows(LayerSpec(768, "float16"), n_samples=1000)
    1024
    """
    fit = CHUNK_BYTES // spec.row_bytes
    rows = min(1 << max(fit.bit_length() - 1, 0), MAX_CHUNK_ROWS)
    if n_samples is not None:
        rows = min(rows, 1 << max(n_samples - 1, 0).bit_length())
    return rows


def read_header(group: zarr.Group, path: str) -> dict[str, Any]:
    """Return the header of a store, once it is known to be one of a format this version reads.

    Raises
    ------
    StoreError
        When it is no store, or one of a newer format.
    """
    header = read_attributes(group)
    if "format" not in header:
        raise StoreError(
            f"'{path}' is a Zarr group but no ncbatch store",
            f"attribute '{ATTRIBUTE}' with a format",
            "make one with 'ncbatch import' or nc.FeatureStore.create",
        )
    number = header["format"]
    if not isinstance(number, int) or number > FORMAT:
        raise StoreError(
            f"'{path}' has store format {number}",
            f"format {FORMAT} or older",
            "install a newer ncbatch to read it",
        )
    return header
