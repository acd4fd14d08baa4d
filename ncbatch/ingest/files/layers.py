"""Layers of features in files: one, those along an axis, or an array per layer; read together."""

from __future__ import annotations

import glob
import itertools
import math
import re
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError, UsageError, unknown_name
from ncbatch.ingest.files.formats.shard import Blocks, Shard, readable
from ncbatch.ingest.files.formats.table import array_names, open_shard
from ncbatch.store.format import natural_key

#: Letters of axes: samples in any order, sequences, positions in order, layers, features.
LETTERS = {"N": "samples", "B": "sequences", "T": "positions", "L": "layers", "D": "features"}
_ROWS = ("N", "B", "T")
# Readings of axes that nothing was said about, by their number; (N, D) is the only one of two.
_BY_NDIM = {
    1: (),
    2: ("N,D",),
    3: ("B,T,D", "T,L,D", "L,T,D", "N,L,D", "L,N,D"),
    4: ("B,T,L,D", "B,L,T,D", "L,B,T,D"),
}
Axes = tuple[str, ...]
# Stands in a name for the number of a layer.
WILD = "{}"
# Read at a time, over all layers: a few chunks of a store, and little beside the interpreter.
_READ_BYTES = 32 * 2**20


# ------------------------------------------ axes: what they count, and how their rows are in order


def parse_axes(text: str) -> Axes:
    """Read axes such as ``B,T,D``.

    Raises
    ------
    UsageError
        For other letters, a letter that comes twice, or axes that do not make rows of features.
    """
    axes = tuple(text.upper().replace(" ", "").split(","))
    is_known = set(axes) <= set(LETTERS) and len(set(axes)) == len(axes) and axes[-1] == "D"
    if not is_known or row_axes(axes) not in (("N",), ("T",), ("B", "T")):
        known = ", ".join(f"{letter} {meaning}" for letter, meaning in LETTERS.items())
        raise UsageError(
            f"--axes '{text}'",
            "N,D  T,D  B,T,D, and with L anywhere before D the same for several layers",
            known,
        )
    return axes


def row_axes(axes: Axes) -> Axes:
    """Return the axes that count rows."""
    return tuple(a for a in axes if a in _ROWS)


def n_rows(axes: Axes, shape: Sequence[int]) -> int:
    """Count the rows of an array."""
    return math.prod(size for a, size in zip(axes, shape, strict=True) if a in _ROWS)


def find_axes(
    shards: Sequence[Shard], asked: str | None, others: Sequence[Shard], layers: bool | None
) -> Axes:
    """Find the axes of features: as asked, (N, D), or the only ones that the labels fit.

    Parameters
    ----------
    shards : sequence of Shard
        The features.
    asked : str or None
        What the user says they are.
    others : sequence of Shard
        Labels or token ids of the same rows; none where there are none.
    layers : bool or None
        Whether several layers are asked for; None: one of several.

    Returns
    -------
    tuple of str
        A letter per axis.

    Raises
    ------
    DataError
        When it must be said, or does not fit; the shape is named.
    """
    shape = shards[0].shape
    if asked is not None:
        axes = parse_axes(asked)
        if len(axes) != len(shape):
            raise DataError(f"features of shape {shape}", f"{len(axes)} axes, as in --axes {asked}")
        return axes
    # Not "T,D": rows that may be shuffled must not be taken for a text.
    if len(shape) == 2:
        return ("N", "D")
    named = [parse_axes(text) for text in _BY_NDIM.get(len(shape), ())]
    if not named:
        raise DataError(
            f"features of shape {shape}", "(N, D): one row per sample, or one to three axes more"
        )
    # What the labels cannot tell apart makes the same rows: T and N of one file.
    plain = [axes for axes in named if "T" not in axes or "B" in axes]
    fitting = [axes for axes in plain if _fits(axes, shards, others)]
    if layers is not None:
        fitting = [axes for axes in fitting if ("L" in axes) == layers] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if others and not fitting:
        trouble = f", which the {others[0].shape} of '{others[0].path}' do not fit"
    else:
        beside = f" beside {others[0].shape}" if others else ""
        trouble = f"{beside}, which can be read in several ways"
    options = ", ".join(f"--axes {','.join(axes)}" for axes in named)
    raise DataError(
        f"features of shape {shape}{trouble}",
        "their axes",
        f"say which it is: {options} (B sequences, T positions, L layers)",
    )


def _fits(axes: Axes, shards: Sequence[Shard], others: Sequence[Shard]) -> bool:
    if not others or any(len(shard.shape) != len(axes) for shard in shards):
        return False
    if sum(n_rows(axes, s.shape) for s in shards) != sum(math.prod(o.shape) for o in others):
        return False
    # Flat labels tell the number of rows and no more; (B, T) tell the sequences too.
    if len(others[0].shape) == 1:
        return True
    sizes = dict(zip(axes, shards[0].shape, strict=True))
    return "B" in sizes and others[0].shape[1:] == (sizes["T"],)


def as_rows(shard: Shard, axes: Axes, layer: int | None = None) -> Shard:
    """View an array as rows in order: (rows, D), (rows, L, D), or (rows,) for axes without D.

    Parameters
    ----------
    shard : Shard
        The array.
    axes : tuple of str
        A letter per axis; sequences become rows one after another.
    layer : int, optional
        The one along L to keep.

    Returns
    -------
    Shard
        Whose first axis counts rows.

    Raises
    ------
    DataError
        When the array has other axes, or can be read in another order only.
    """
    if len(shard.shape) != len(axes):
        raise DataError(
            f"'{shard.path}' of shape {shard.shape}", f"{len(axes)} axes: {','.join(axes)}"
        )
    sizes = dict(zip(axes, shard.shape, strict=True))
    if layer is not None and not 0 <= layer < sizes.get("L", 0):
        raise UsageError(
            f"--layer-index {layer}", f"0 to {sizes.get('L', 0) - 1}, as in {shard.path}"
        )
    counted = row_axes(axes)
    # Rows are the first axis, and no layer is left out: nothing to turn.
    if counted == axes[:1] and layer is None:
        return shard
    if shard.read is None and axes[0] == "L":
        raise DataError(
            f"'{shard.path}' with its layers on the first axis, but this format is read in order",
            "rows on the first axis",
            "save it as .npy, .safetensors or .h5, or a file per layer",
        )
    rest = [sizes[a] for a in "LD" if a in sizes and not (a == "L" and layer is not None)]
    order = [axes.index(a) for a in (*counted, *(a for a in "LD" if a in axes))]

    def blocks(n: int) -> Blocks:
        for part in _parts(shard, axes, layer, n):
            turned = part.transpose(order)
            size = math.prod(turned.shape[: len(counted)])
            # Not reshape(-1): arrays without features have no rows to count.
            yield np.ascontiguousarray(turned).reshape(size, *rest)

    return Shard(shard.path, (n_rows(axes, shard.shape), *rest), shard.dtype, blocks)


def _parts(shard: Shard, axes: Axes, layer: int | None, n: int) -> Iterator[npt.NDArray[Any]]:
    """Read an array in the order of its rows, n or so at a time; all its axes stay."""
    counted = row_axes(axes)
    sizes = dict(zip(axes, shard.shape, strict=True))
    n_inner = max(math.prod(sizes[a] for a in counted[1:]), 1)
    index = dict.fromkeys(axes, slice(None))
    if layer is not None:
        index["L"] = slice(layer, layer + 1)
    if shard.read is None:  # in order only: whole sequences, however long
        for block in shard.blocks(max(n // n_inner, 1)):
            yield block[tuple(index.values())]
        return
    # Whole sequences where one fits, else parts of one; by whole chunks, to decode none twice.
    fits = n >= n_inner
    along = counted[0] if fits else counted[-1]
    chunk = dict(zip(axes, shard.chunks, strict=True))[along] if shard.chunks else 1
    steps = {a: max(sizes[a], 1) if fits else 1 for a in counted}
    steps[along] = max((n // n_inner if fits else n) // chunk, 1) * chunk
    for starts in itertools.product(*(range(0, sizes[a], steps[a]) for a in counted)):
        for axis, start in zip(counted, starts, strict=True):
            index[axis] = slice(start, start + steps[axis])
        yield shard.read(tuple(index.values()))


# ----------------------------------------------- rows: files, or globs of shards, read in order


@dataclass(frozen=True)
class RowStream:
    """The rows of one or several shards, in order.

    Attributes
    ----------
    what : str
        What they are, for messages: ``features``, ``labels``.
    shards : tuple of Shard
        In natural order of their names; the first axis of each counts rows.
    """

    what: str
    shards: tuple[Shard, ...]

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.shape[0] for shard in self.shards)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.shards[0].shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds the values of every shard."""
        return np.result_type(*{shard.dtype for shard in self.shards})

    def row_of(self, row: int) -> str:
        """Name an input row, and its shard where there are several."""
        if len(self.shards) == 1:
            return f"row {row}"
        starts = [0, *itertools.accumulate(shard.shape[0] for shard in self.shards)]
        number = bisect(starts, row) - 1
        return f"row {row} (row {row - starts[number]} of '{self.shards[number].path}')"

    def batches(self, n: int) -> Blocks:
        """Read all rows in order, exactly `n` at a time but for the last."""
        held: list[npt.NDArray[Any]] = []
        count = 0
        for shard in self.shards:
            with readable(shard.path, self.what):
                for block in shard.blocks(n):
                    held.append(block)
                    count += len(block)
                    # Blocks of a format end where it likes; callers read several streams in step.
                    while count >= n:
                        joined = held[0] if len(held) == 1 else np.concatenate(held)
                        yield joined[:n]
                        held = [joined[n:]]
                        count -= n
        if count:
            yield np.concatenate(held)


def read_rows_of(n_bytes: int) -> int:
    """Choose how many rows of `n_bytes` to read at a time."""
    return max(1, _READ_BYTES // max(n_bytes, 1))


def open_rows(source: str, what: str = "features") -> RowStream:
    """Open a file, or a glob of shards, of rows.

    Parameters
    ----------
    source : str
        ``x.npy``, ``x.safetensors:key`` or another form of ``docs/import.md``, or a glob of them.
    what : str, optional
        What the rows are, for messages.

    Returns
    -------
    RowStream
        The shards, in natural order (``x2`` before ``x10``).

    Raises
    ------
    DataError
        When nothing is there, a file cannot be read, or shards do not fit together.
    UnknownNameError
        When a file has no array of that name.
    """
    return join_shards(open_shards(source, what), what)


def open_shards(source: str, what: str) -> tuple[Shard, ...]:
    """Open the arrays that `source` names, whatever their axes."""
    paths, key = find_paths(source, what)
    try:
        return tuple(open_shard(path, key, what) for path in paths)
    except DataError as error:
        if key is not None or len(paths) == 1:
            raise
        # What to write is the glob, not the file that it found first.
        remedy = error.remedy.replace(f"'{paths[0]}:", f"'{source}:")
        raise DataError(error.found, error.expected, remedy) from error


def join_shards(shards: Iterable[Shard], what: str) -> RowStream:
    """Make one stream of shards whose rows have one shape."""
    first, *others = shards
    for shard in others:
        if shard.shape[1:] != first.shape[1:]:
            raise DataError(
                f"shard '{shard.path}' with rows of shape {shard.shape[1:]}",
                f"{first.shape[1:]}, as in '{first.path}'",
            )
    return RowStream(what, (first, *others))


def find_paths(source: str, what: str) -> tuple[list[str], str | None]:
    """Split a source into the paths that are there and the name of an array in them.

    Parameters
    ----------
    source : str
        A path or a glob; after a colon the array's name.
    what : str
        What is there, for messages.

    Returns
    -------
    tuple of list of str and str or None
        The paths, in natural order.

    Raises
    ------
    DataError
        When nothing is there.
    """
    colons = [match.start() for match in re.finditer(":", source)]
    # What is there is no glob, though its name may look like one.
    for end in [len(source), *colons]:
        if end and Path(source[:end]).exists():
            return [source[:end]], source[end + 1 :] or None
    # The shortest first: what stands behind a colon may hold letters of a glob.
    for end in [*colons, len(source)]:
        paths = sorted(glob.glob(source[:end]), key=natural_key)
        if paths:
            return paths, source[end + 1 :] or None
    raise DataError(f"no {what} at '{source}'", "an existing file, or a glob of shards")


# ------------------------------------------------------- layers: by an axis, or an array per layer


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
        # One stream of rows (L, D) holds all layers, which are equally wide.
        widths = (stream.row_shape[-1] for stream in itertools.cycle(self.streams))
        return dict(zip(self.names, widths, strict=False))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds the values of every layer."""
        return np.result_type(*{stream.dtype for stream in self.streams})

    @property
    def rows_at_once(self) -> int:
        """How many rows to read at a time."""
        row_bytes = (math.prod(s.row_shape) * s.dtype.itemsize for s in self.streams)
        return read_rows_of(sum(row_bytes))

    def batches(self, n: int) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        """Read all rows in order, exactly `n` at a time but for the last, of all layers at once."""
        for parts in zip(*(stream.batches(n) for stream in self.streams), strict=True):
            blocks = np.moveaxis(parts[0], 1, 0) if parts[0].ndim == 3 else parts
            yield dict(zip(self.names, blocks, strict=True))


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
    by_array = WILD in source
    arrays = _open_numbered(source) if by_array else {None: open_shards(source, "features")}
    first = next(iter(arrays.values()))
    several = not isinstance(layer, str) or WILD in layer or layer_index is not None
    letters = find_axes(first, axes, others, several and not by_array)
    if by_array and "L" in letters:
        raise UsageError(
            f"'{source}' with --axes {','.join(letters)}", "layers by array or by axis, not both"
        )
    if layer_index is not None and "L" not in letters:
        raise UsageError(
            f"--layer-index {layer_index} for features of shape {first[0].shape}",
            "layers on an axis",
            f"such as --axes {','.join(letters[:-1])},L,D",
        )
    streams = tuple(
        join_shards((as_rows(shard, letters, layer_index) for shard in shards), "features")
        for shards in arrays.values()
    )
    # As arrays: two that are turned against each other have equally many rows.
    for shards in arrays.values():
        _check_rows(shards, first, letters)
    numbers: list[int | None] = list(arrays)
    if layer_index is not None:
        numbers = [layer_index]
    elif len(streams[0].row_shape) == 2:
        numbers = list(range(streams[0].row_shape[0]))
    return Layers(_name_layers(layer, numbers, first[0]), streams, letters, first)


def _check_rows(shards: Sequence[Shard], first: Sequence[Shard], axes: Axes) -> None:
    """Compare the rows of a layer with those of the first, file by file."""
    for shard, other in zip(shards, first, strict=True):
        rows, expected = (
            [size for a, size in zip(axes, s.shape, strict=True) if a in _ROWS]
            for s in (shard, other)
        )
        if rows != expected:
            raise DataError(
                f"{' x '.join(map(str, rows))} rows in '{shard.path}'",
                f"{' x '.join(map(str, expected))}, as in '{other.path}'",
            )


def _open_numbered(source: str) -> dict[int | None, tuple[Shard, ...]]:
    """Open an array per layer: those whose names have a number in the place of ``{}``."""
    paths, key = find_paths(source, "features")
    if key is None or key.count(WILD) != 1:
        raise UsageError(
            f"features '{source}'", "{} once, after the colon, for the number of the layer"
        )
    before, _, after = key.partition(WILD)
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    files = {path: _find_numbered(path, key, pattern) for path in paths}
    first = files[paths[0]]
    for path, names in files.items():
        if names.keys() != first.keys():
            raise DataError(
                f"'{path}' holds layers {_list(names)}", f"{_list(first)}, as '{paths[0]}'"
            )
    return {
        number: tuple(open_shard(path, names[number], "features") for path, names in files.items())
        for number in sorted(first)
    }


def _find_numbered(path: str, key: str, pattern: re.Pattern[str]) -> dict[int, str]:
    """Name the arrays of a file that are layers by their numbers, which may have leading zeros."""
    names = array_names(path, "features")
    layers: dict[int, str] = {}
    for match in filter(None, map(pattern.fullmatch, names)):
        twin = layers.setdefault(int(match[1]), match[0])
        if twin != match[0]:
            raise DataError(f"'{path}' holds '{twin}' and '{match[0]}'", "one array per layer")
    if not layers:
        raise unknown_name("array", key, names, f"'{path}'")
    return layers


def _list(numbers: Iterable[int]) -> str:
    known = sorted(numbers)
    return ", ".join(map(str, known[:12])) + (f", ... ({len(known)})" if len(known) > 12 else "")


def _name_layers(
    layer: str | Sequence[str], numbers: Sequence[int | None], shard: Shard
) -> tuple[str, ...]:
    """Name the layers by a pattern or by a list."""
    names = (layer,) if isinstance(layer, str) else tuple(layer)
    if len(names) == 1 and WILD in names[0]:
        if numbers == [None]:
            raise UsageError(
                f"--layer '{names[0]}' for a single layer in '{shard.path}'", "a name without {}"
            )
        return tuple(names[0].replace(WILD, str(number)) for number in numbers)
    if any(WILD in name for name in names):
        raise UsageError(f"--layer {' --layer '.join(names)}", "one pattern, or a name per layer")
    if len(names) != len(numbers):
        raise UsageError(
            f"{len(names)} layer name{'s' if len(names) > 1 else ''} for {len(numbers)} layers, "
            f"features of shape {shard.shape} in '{shard.path}'",
            "one layer (N, D), a name per layer, or a pattern",
            f"write --layer '{names[0]}.{{}}', or take one with --layer-index",
        )
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"--layer {name} twice", "a name per layer")
    return names
