"""What writers share: rows collected into whole chunks, and labels that are checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays import Array, to_numpy
from ncbatch.errors import DataError
from ncbatch.store.commit_records import Share
from ncbatch.store.format import LayerSpec
from ncbatch.store.nodes import create_array, found_group


class RowBuffer:
    """Collects rows and writes them to an array one whole chunk at a time."""

    def __init__(
        self,
        name: str,
        spec: LayerSpec,
        rows: int,
        order: int,
        home: str | None = None,
        *,
        share: Share | None = None,
        base_block: int = 1,
    ) -> None:
        self.name, self.spec, self.chunk, self.order = name, spec, rows, order
        self.home = name if home is None else home  # the layer's group
        self.array: zarr.Array[Any] | None = None
        self.written = 0  # rows of this writer that are stored
        self._share, self._base_block = share or Share(), base_block
        self._rows = np.empty((0, spec.n_features), spec.numpy_dtype)
        self._fill = 0

    def cast(self, rows: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
        """Convert rows to the stored dtype; refuse values that overflow it."""
        if rows.dtype == self.spec.numpy_dtype:
            return rows
        with np.errstate(over="ignore"):
            cast = rows.astype(self.spec.numpy_dtype)
        infinite = np.isinf(cast)
        if infinite.any():  # bfloat16 overflows float16 too, which is no smaller
            overflow = infinite & np.isfinite(rows)
            if overflow.any():
                row = int(np.argwhere(overflow)[0][0])
                raise DataError(
                    f"layer '{self.name}' row {first + row} overflows {self.spec.dtype}",
                    remedy="store the layer as bfloat16 or float32",
                )
        return cast

    def add(self, rows: npt.NDArray[Any], group: zarr.Group, capacity: int) -> None:
        """Take rows, and write every chunk that becomes full."""
        start = 0
        while start < len(rows):
            if self._fill == 0 and len(self._rows) != self.chunk:
                self._rows = np.empty((self.chunk, self.spec.n_features), self.spec.numpy_dtype)
            take = min(self.chunk - self._fill, len(rows) - start)
            self._rows[self._fill : self._fill + take] = rows[start : start + take]
            self._fill += take
            start += take
            if self._fill == self.chunk:
                self.flush(group, capacity)

    def flush(self, group: zarr.Group, capacity: int) -> None:
        """Write what is held."""
        if not self._fill:
            return
        start = self._share.row(self.written, self._base_block)
        stop = start + self._fill
        array = self.array
        if array is None:  # an empty one is false
            array = self.create(group, max(stop, capacity))
        reserve(array, stop)
        array[start:stop] = self._rows[: self._fill]
        self.written, self._fill = self.written + self._fill, 0

    def create(self, group: zarr.Group, capacity: int, *, complete: bool = True) -> zarr.Array[Any]:
        """Make the layer's array in the split's `group`, with room for `capacity` rows."""
        attributes = {"complete": complete, "order": self.order}
        home = found_group(found_group(group, "layers"), self.home, attributes)
        width = self.spec.n_features
        self.array = create_array(
            home, "feature", shape=(capacity, width), chunks=(self.chunk, width),
            dtype=self.spec.dtype, dimensions=("sample", "unit"),
        )  # fmt: skip
        return self.array


def checked_labels(values: Array, what: str, n_classes: int, first: int) -> npt.NDArray[np.int32]:
    """Check class ids below K for rows from `first` on; negative ones become -1."""
    array = to_numpy(values) if hasattr(values, "shape") else np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{what}s of shape {array.shape}, {array.dtype}", "integers, shape (n,)")
    if array.size and int(array.max()) >= n_classes:
        row = int(array.argmax())
        raise DataError(
            f"{what} {int(array[row])} in row {first + row}",
            f"{what}s below {n_classes}, the classes of the store",
        )
    return np.where(array < 0, -1, array).astype(np.int32)


def reserve(array: zarr.Array[Any], rows: int) -> None:
    """Let an array hold `rows`; doubling keeps the number of metadata writes small."""
    if array.shape[0] < rows:
        array.resize((max(rows, 2 * array.shape[0]), *array.shape[1:]))
