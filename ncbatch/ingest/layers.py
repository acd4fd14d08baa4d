"""Layers of features in files: one, those along an axis, or an array per layer; read together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError, UsageError, unknown_name
from ncbatch.ingest.axes import Axes, as_rows, find_axes, row_axes
from ncbatch.ingest.formats import Shard, array_names, open_shard
from ncbatch.ingest.rows import RowStream, find_paths, join_shards, open_shards, read_rows_of

WILD = "{}"


@dataclass(frozen=True)
class Layers:
    """Features of layers whose rows are the same.

    Attributes
    ----------
    names : tuple of str
        One per layer.
    streams : tuple of RowStream
        Rows (D,), one stream per layer; or one stream of rows (L, D).
    axes : tuple of str
        What the axes of the files count.
    shards : tuple of Shard
        The arrays of the first layer as they are.
    """

    names: tuple[str, ...]
    streams: tuple[RowStream, ...]
    axes: Axes
    shards: tuple[Shard, ...]

    @property
    def n_rows(self) -> int:
        """Rows of every layer."""
        return self.streams[0].n_rows

    @property
    def widths(self) -> dict[str, int]:
        """D of each layer."""
        if len(self.streams) == 1:
            return dict.fromkeys(self.names, self.streams[0].row_shape[-1])
        return {n: s.row_shape[0] for n, s in zip(self.names, self.streams, strict=True)}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds the values of every layer."""
        return np.result_type(*{stream.dtype for stream in self.streams})

    @property
    def rows_at_once(self) -> int:
        """How many rows to read at a time."""
        return read_rows_of(sum(stream.row_bytes for stream in self.streams))

    def batches(self, n: int) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        """Read all rows in order, exactly `n` at a time but for the last, of all layers at once."""
        if len(self.streams) > 1:
            for parts in zip(*(stream.batches(n) for stream in self.streams), strict=True):
                yield dict(zip(self.names, parts, strict=True))
            return
        for block in self.streams[0].batches(n):
            if block.ndim == 2:
                yield {self.names[0]: block}
            else:
                yield {name: block[:, i] for i, name in enumerate(self.names)}


def open_layers(
    source: str,
    layer: str | Sequence[str],
    axes: str | None = None,
    layer_index: int | None = None,
    others: Sequence[Shard] = (),
) -> Layers:
    """Open features of one or several layers.

    Parameters
    ----------
    source : str
        Where they are; ``{}`` in the name of an array stands for the number of a layer.
    layer : str or sequence of str
        The layer's name, with ``{}`` for its number, or a name per layer.
    axes : str, optional
        What the axes count, such as ``B,T,D``.
    layer_index : int, optional
        The one along the axis L to take.
    others : sequence of Shard, optional
        Labels or token ids, from which the axes may be seen.

    Raises
    ------
    DataError
        When features cannot be read or their axes must be said.
    UsageError
        When names and layers do not fit together.
    """
    wild, several = WILD in source, not isinstance(layer, str) or WILD in layer
    arrays = _numbered(source) if wild else {None: open_shards(source, "features")}
    first = next(iter(arrays.values()))
    wanted = None if wild else several or layer_index is not None
    found = find_axes(first, axes, others, False if wild else wanted)
    if wild and "L" in found:
        raise UsageError(
            f"'{source}' with --axes {','.join(found)}", "layers by array or by axis, not both"
        )
    if layer_index is not None and "L" not in found:
        raise UsageError(
            f"--layer-index {layer_index} for features of shape {first[0].shape}",
            "layers on an axis", f"such as --axes {','.join(found[:-1])},L,D",
        )  # fmt: skip
    streams = tuple(
        join_shards((as_rows(shard, found, layer_index) for shard in shards), "features")
        for shards in arrays.values()
    )
    for shards in arrays.values():
        _check_rows(shards, first, found)
    numbers = _numbers(list(arrays), streams[0], layer_index)
    return Layers(_names(layer, numbers, first[0]), streams, found, first)


def _check_rows(shards: Sequence[Shard], first: Sequence[Shard], axes: Axes) -> None:
    """Compare the rows of a layer with those of the first, file by file."""
    for shard, other in zip(shards, first, strict=True):
        own, theirs = (
            [size for a, size in zip(axes, s.shape, strict=True) if a in row_axes(axes)]
            for s in (shard, other)
        )
        if own != theirs:
            raise DataError(
                f"{' x '.join(map(str, own))} rows in '{shard.path}'",
                f"{' x '.join(map(str, theirs))}, as in '{other.path}'",
            )


def _numbered(source: str) -> dict[int | None, tuple[Shard, ...]]:
    """Open an array per layer: those whose names have a number in the place of ``{}``."""
    paths, key = find_paths(source, "features")
    if key is None or key.count(WILD) != 1:
        raise UsageError(
            f"features '{source}'", "{} once, after the colon, for the number of the layer"
        )
    before, _, after = key.partition(WILD)
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    files = [_matching(path, key, pattern) for path in paths]
    for path, found in zip(paths, files, strict=True):
        if found.keys() != files[0].keys():
            raise DataError(
                f"'{path}' holds layers {_shown(found)}", f"{_shown(files[0])}, as '{paths[0]}'"
            )
    return {
        number: tuple(
            open_shard(path, found[number], "features")
            for path, found in zip(paths, files, strict=True)
        )
        for number in sorted(files[0])
    }


def _matching(path: str, key: str, pattern: re.Pattern[str]) -> dict[int, str]:
    """Name the arrays of a file that are layers by their numbers, which may have leading zeros."""
    names = array_names(path, "features")
    found: dict[int, str] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            twin = found.setdefault(int(match[1]), name)
            if twin != name:
                raise DataError(f"'{path}' holds '{twin}' and '{name}'", "one array per layer")
    if not found:
        raise unknown_name("array", key, names, f"'{path}'")
    return found


def _shown(numbers: Iterable[int]) -> str:
    known = sorted(numbers)
    return ", ".join(map(str, known[:12])) + (f", ... ({len(known)})" if len(known) > 12 else "")


def _numbers(
    keys: list[int | None], stream: RowStream, layer_index: int | None
) -> list[int | None]:
    if keys != [None]:
        return keys
    if layer_index is not None:
        return [layer_index]
    return list(range(stream.row_shape[0])) if len(stream.row_shape) == 2 else [None]


def _names(layer: str | Sequence[str], numbers: list[int | None], shard: Shard) -> tuple[str, ...]:
    """Name the layers by a pattern or by a list."""
    given = (layer,) if isinstance(layer, str) else tuple(layer)
    if len(given) == 1 and WILD in given[0]:
        if numbers == [None]:
            raise UsageError(
                f"--layer '{given[0]}' for a single layer in '{shard.path}'", "a name without {}"
            )
        return tuple(given[0].replace(WILD, str(number)) for number in numbers)
    if any(WILD in name for name in given):
        raise UsageError(f"--layer {' --layer '.join(given)}", "one pattern, or a name per layer")
    if len(given) != len(numbers):
        raise UsageError(
            f"{len(given)} layer name{'s' if len(given) > 1 else ''} for {len(numbers)} layers, "
            f"features of shape {shard.shape} in '{shard.path}'",
            "one layer (N, D), a name per layer, or a pattern",
            f"write --layer '{given[0]}.{{}}', or take one with --layer-index",
        )
    twice = [name for name, count in Counter(given).items() if count > 1]
    if twice:
        raise UsageError(f"--layer {twice[0]} twice", "a name per layer")
    return given
