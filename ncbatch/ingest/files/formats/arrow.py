"""Columns of Parquet and Arrow files, and of folders of ``datasets.save_to_disk``, by batches."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncbatch.errors import DataError
from ncbatch.ingest.files.formats import shard
from ncbatch.ingest.files.formats.shard import Block, Blocks, Shard

_FILE_MAGIC = b"ARROW1"
Columns = Iterator[Any]

# --------------------------- columns as arrays: scalars, and lists of one length, nested or not


def row_shape(
    pa: Any, where: str, kind: Any, first: Any | None
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Find the shape of one row of a column, and the dtype of its values.

    Parameters
    ----------
    pa : module
        ``pyarrow``.
    where : str
        The column, for messages.
    kind : pyarrow.DataType
        The column's type.
    first : pyarrow.Array or None
        Rows of it, whose lists tell the lengths that the type leaves open.

    Raises
    ------
    DataError
        When values are no numbers.
    """
    if isinstance(kind, pa.FixedShapeTensorType):
        if kind.permutation not in (None, list(range(len(kind.shape)))):
            raise DataError(f"'{where}' holds permuted tensors", "tensors stored by rows")
        return tuple(kind.shape), _dtype(pa, where, kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        storage = None if first is None else getattr(first, "storage", first)
        return row_shape(pa, where, kind.storage_type, storage)
    shape: list[int] = []
    values = first
    while _is_list(pa, kind):
        if pa.types.is_fixed_size_list(kind):
            shape.append(int(kind.list_size))
        else:
            # That of the first list that holds something; an odd row before it is found later.
            lengths = (len(row) for row in values or () if row.is_valid and len(row))
            shape.append(next(lengths, 0))
        kind = kind.value_type
        values = None if values is None else values.flatten()
    return tuple(shape), _dtype(pa, where, kind)


def to_rows(pa: Any, where: str, array: Any, shape: tuple[int, ...], start: int) -> Block:
    """Copy rows of a column to NumPy.

    Parameters
    ----------
    pa : module
        ``pyarrow``.
    where : str
        The column, for messages.
    array : pyarrow.Array
        Some of its rows.
    shape : tuple of int
        What every row must have.
    start : int
        Number of the first row, for messages.

    Raises
    ------
    DataError
        When a row has another shape or values are missing; named by row.
    """
    n_rows = len(array)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    # Values of a tensor lie flat in one list, whatever its shape.
    flat = pa.types.is_fixed_size_list(array.type) and not _is_list(pa, array.type.value_type)
    n_lists = 1  # of this depth in one row
    for length in (math.prod(shape),) if flat else shape:
        _refuse_missing(where, array, n_lists, start)
        if not pa.types.is_fixed_size_list(array.type):
            _check_lengths(where, array, length, n_lists, start)
        array = array.flatten()
        n_lists *= max(length, 1)
    _refuse_missing(where, array, n_lists, start)
    return np.array(array.to_numpy(zero_copy_only=False)).reshape(n_rows, *shape)


def _is_list(pa: Any, kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _dtype(pa: Any, where: str, kind: Any) -> np.dtype[Any]:
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"'{where}' holds values of type {kind}", "numbers, or lists of numbers")
    dtype: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
    return dtype


def _refuse_missing(where: str, array: Any, n_lists: int, start: int) -> None:
    if array.null_count:
        missing = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"'{where}' has no value in row {start + missing // n_lists}", "no nulls")


def _check_lengths(where: str, array: Any, length: int, n_lists: int, start: int) -> None:
    lengths = np.diff(array.offsets.to_numpy(zero_copy_only=False))
    odd = np.flatnonzero(lengths != length)
    if odd.size:
        first = int(odd[0])
        raise DataError(
            f"'{where}' has {int(lengths[first])} values in row {start + first // n_lists}",
            f"{length}, as in its first row" + (" that holds some" if not lengths[0] else ""),
            "save rows of one length (padded, with a mask), or one row per token",
        )


# ----------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """A table in one or several files.

    Attributes
    ----------
    schema : pyarrow.Schema
        Its columns.
    n_rows : callable
        Counts its rows.
    columns : callable
        ``columns(name, n)`` gives the arrays of a column in order, where it can n rows at a time.
    """

    schema: Any
    n_rows: Callable[[], int]
    columns: Callable[[str, int], Columns]


def open_column(path: str, key: str | None, what: str, read: Callable[[str], Table]) -> Shard:
    """Open a column of a file or folder that `read` opens."""
    pa = shard.library("pyarrow", "files", path)
    table = read(path)
    name = shard.choose_key(path, key, table.schema.names, "column")
    if table.schema.names.count(name) > 1:
        raise DataError(f"'{path}' holds several columns '{name}'", "columns of different names")
    where = f"{path}:{name}"
    n_rows = table.n_rows()
    kind = table.schema.field(name).type
    shape, dtype = row_shape(pa, where, kind, None)
    # Lengths that the type leaves open are those of the first rows whose lists hold something,
    # mostly the first. That one by itself first: a row may be large.
    first = itertools.islice(table.columns(name, 1), 1)
    for array in itertools.chain(first, table.columns(name, 64)) if 0 in shape else ():
        shape, _ = row_shape(pa, where, kind, array)
        if 0 not in shape:
            break

    def blocks(n: int) -> Blocks:
        start = 0
        for array in table.columns(name, n):
            for part in range(0, len(array), n):
                yield to_rows(pa, where, array.slice(part, n), shape, start + part)
            start += len(array)
        if start != n_rows:
            raise DataError(f"'{where}' ends in row {start}", f"{n_rows} rows")

    return Shard(where, (n_rows, *shape), dtype, blocks)


def is_dataset(path: str) -> bool:
    """Tell whether a folder was made by ``datasets.save_to_disk``."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_parquet(path: str) -> Table:
    """Open a Parquet file."""
    parquet = shard.library("pyarrow.parquet", "files", path)

    def columns(name: str, n: int) -> Columns:
        # Not buffered ahead: a row group may be larger than memory.
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=n, columns=[name]):
                yield batch.column(batch.schema.get_field_index(name))

    with parquet.ParquetFile(path) as file:
        n_rows = int(file.metadata.num_rows)
        return Table(file.schema_arrow, lambda: n_rows, columns)


def read_arrow(path: str) -> Table:
    """Open an Arrow file, of the file or the stream format (Feather is the former)."""
    pa = shard.library("pyarrow", "files", path)
    shard.library("pyarrow.ipc", "files", path)
    with open(path, "rb") as plain:
        in_order = plain.read(len(_FILE_MAGIC)) != _FILE_MAGIC
    with pa.OSFile(path) as file:
        reader = pa.ipc.open_stream(file) if in_order else pa.ipc.open_file(file)
        schema = reader.schema

    def batches(source: Any, name: str) -> Iterator[Any]:
        field = [schema.names.index(name)]
        options = pa.ipc.IpcReadOptions(included_fields=field, use_threads=False)
        if in_order:
            yield from pa.ipc.open_stream(source, options=options)
            return
        file = pa.ipc.open_file(source, options=options)
        yield from map(file.get_batch, range(file.num_record_batches))

    def n_rows() -> int:
        if not in_order:  # from the metadata
            dataset = shard.library("pyarrow.dataset", "files", path)
            return int(dataset.dataset(path, format="ipc").count_rows())
        # A map, so that no value is touched unless it is compressed.
        with pa.memory_map(path) as source:
            return sum(batch.num_rows for batch in batches(source, schema.names[0]))

    def columns(name: str, n: int) -> Columns:
        # Not a map, whose pages would stay: one record batch is held, in memory of its own.
        with pa.OSFile(path) as source:
            for batch in batches(source, name):
                yield batch.column(0)

    return Table(schema, n_rows, columns)


def read_dataset(path: str) -> Table:
    """Open all files of a folder that ``datasets.save_to_disk`` made."""
    tables = [read_arrow(file) for file in _dataset_files(path)]
    return Table(
        tables[0].schema,
        lambda: sum(table.n_rows() for table in tables),
        lambda name, n: itertools.chain.from_iterable(table.columns(name, n) for table in tables),
    )


def _dataset_files(path: str) -> list[str]:
    """Name the Arrow files of a folder of ``datasets.save_to_disk``, in order."""
    folder = Path(path)
    if not (folder / "state.json").is_file():
        parts = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))
        splits = [str(name) for name in parts.get("splits", [])]
        raise DataError(
            f"'{path}' holds the data sets {', '.join(splits)}",
            "one of them",
            f"write '{folder / splits[0]}:COLUMN'" if splits else "",
        )
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    # datasets before 2.10 left the order of its rows in a table beside them.
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"'{path}' was saved with an order of its own for its rows (an indices mapping)",
            "rows saved in order",
            f"datasets.load_from_disk('{path}').flatten_indices().save_to_disk('{path}-flat')",
        )
    files = [str(folder / str(file["filename"])) for file in state.get("_data_files", [])]
    if not files:
        raise DataError(f"'{path}' names no data files", "a folder of datasets.save_to_disk")
    return files
