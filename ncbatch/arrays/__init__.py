"""Array libraries: one code path over NumPy, CuPy, torch and any other array-API library."""

from ncbatch.arrays.namespace import (
    Array,
    as_float64,
    first_nonfinite_row,
    namespace,
    scalar,
    to_numpy,
)
from ncbatch.arrays.products import row_blocks, symmetric_product, triangular_factor
from ncbatch.arrays.rows import CentredRows, StoredRows
from ncbatch.arrays.segments import Segments, add_at, segment_sum
from ncbatch.arrays.threads import cpu_count, map_threads, max_pending

__all__ = [
    "Array",
    "CentredRows",
    "Segments",
    "StoredRows",
    "add_at",
    "as_float64",
    "cpu_count",
    "first_nonfinite_row",
    "map_threads",
    "max_pending",
    "namespace",
    "row_blocks",
    "scalar",
    "segment_sum",
    "symmetric_product",
    "to_numpy",
    "triangular_factor",
]
