"""Array libraries: one code path over NumPy, CuPy, torch and any other array-API library."""

from ncbatch.arrays.devices import Device, cuda_chunk, cuda_meta, find_device
from ncbatch.arrays.namespace import (
    Array,
    as_float64,
    first_nonfinite_row,
    namespace,
    scalar,
    to_numpy,
)
from ncbatch.arrays.rows import (
    CentredRows,
    ChosenRows,
    StackedRows,
    StoredRows,
    block_rows,
    float64_blocks,
    mean_of_rows,
    product_rows,
    row_blocks,
    symmetric_product,
    take_rows,
    triangular_factor,
)
from ncbatch.arrays.segments import Segments, add_at, segment_sum
from ncbatch.arrays.threads import cpu_count, map_threads, max_pending, read_ahead, thread_limit

__all__ = [
    "Array",
    "CentredRows",
    "ChosenRows",
    "Device",
    "Segments",
    "StackedRows",
    "StoredRows",
    "add_at",
    "as_float64",
    "block_rows",
    "cpu_count",
    "cuda_chunk",
    "cuda_meta",
    "find_device",
    "first_nonfinite_row",
    "float64_blocks",
    "map_threads",
    "max_pending",
    "mean_of_rows",
    "namespace",
    "product_rows",
    "read_ahead",
    "row_blocks",
    "scalar",
    "segment_sum",
    "symmetric_product",
    "take_rows",
    "thread_limit",
    "to_numpy",
    "triangular_factor",
]
