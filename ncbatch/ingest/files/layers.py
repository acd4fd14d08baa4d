"""Layers of features in files: one, those along an axis, or an array per layer; read together."""

from __future__ import annotations

import glob
import itertools
import math
import re
from collections import Counter
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

# Axes: what each axis of an array in a file counts, and how its rows are read in order.


#: Letters of axes: samples in any order, sequences, positions in order, layers, features.
LETTERS = {"N": "samples", "B": "sequences", "T": "positions", "L": "layers", "D": "features"}
_ROWS = ("N", "B", "T")
_BY_NDIM = {
    1: (),
    2: ("N,D",),
    3: ("B,T,D", "T,L,D", "L,T,D", "N,L,D", "L,N,D"),
    4: ("B,T,L,D", "B,L,T,D", "L,B,T,D"),
}
Axes = tuple[str, ...]


def parse_axes(text: str) -> Axes:
    """Read axes such as ``B,T,D``.

    Raises
    ------
    UsageError
        For other letters, a letter that comes twice, or axes that do not make rows of features.
    """
    axes = tuple(text.upper().replace(" ", "").split(","))
    rows = tuple(a for a in axes if a in _ROWS)
    good = (
        all(a in LETTERS for a in axes)
        and len(set(axes)) == len(axes)
        and axes[-1] == "D"
        and rows in (("N",), ("T",), ("B", "T"))
    )
    if not good:
        known = ", ".join(f"{letter} {meaning}" for letter, meaning in LETTERS.items())
        raise UsageError(
            f"--axes '{text}'",
            "N,D  T,D  B,T,D, and with L anywhere before D the same for several layers",
            known,
        )
    return axes


def row_axes(axes: Axes) -> Axes:
    """Give the axes that count rows."""
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
    beside = f" beside {others[0].shape}" if others else ""
    raise DataError(
        f"features of shape {shape}{beside}, which can be read in several ways"
        if fitting or not others
        else f"features of shape {shape}, which the {others[0].shape} of '{others[0].path}' do not fit",
        "their axes",
        "say which it is: "
        + ", ".join(f"--axes {','.join(axes)}" for axes in named)
        + " (B sequences, T positions, L layers)",
    )


def _fits(axes: Axes, shards: Sequence[Shard], others: Sequence[Shard]) -> bool:
    if not others or any(len(shard.shape) != len(axes) for shard in shards):
        return False
    if sum(n_rows(axes, s.shape) for s in shards) != sum(math.prod(o.shape) for o in others):
        return False
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
    rows = tuple(sizes[a] for a in row_axes(axes))
    rest = [sizes[a] for a in "LD" if a in sizes and not (a == "L" and layer is not None)]
    if len(rows) == 1 and axes[0] in _ROWS and layer is None:
        return shard
    if shard.read is None and axes[0] == "L":
        raise DataError(
            f"'{shard.path}' with its layers on the first axis, but this format is read in order",
            "rows on the first axis",
            "save it as .npy, .safetensors or .h5, or a file per layer",
        )

    def blocks(n: int) -> Blocks:
        parts = _parts(shard, axes, rows, layer, n)
        for part in parts:
            yield _in_order(part, axes, layer)

    return Shard(shard.path, (math.prod(rows), *rest), shard.dtype, blocks)


def _parts(
    shard: Shard, axes: Axes, rows: tuple[int, ...], layer: int | None, n: int
) -> Iterator[npt.NDArray[Any]]:
    """Read an array in the order of its rows, n or so at a time; all its axes stay."""
    at = axes.index("L") if "L" in axes else -1
    keep = slice(None) if layer is None else slice(layer, layer + 1)
    if shard.read is None:
        for block in shard.blocks(max(n // math.prod(rows[1:]), 1) if math.prod(rows) else 1):
            yield block[tuple(keep if i == at else slice(None) for i in range(len(axes)))]
        return
    chunks = dict(zip(axes, shard.chunks or (1,) * len(axes), strict=True))
    steps = _steps(rows, [chunks[a] for a in row_axes(axes)], n)
    ranges = [range(0, size, step) for size, step in zip(rows, steps, strict=True)]
    for starts in itertools.product(*ranges):
        index = {
            a: slice(s, s + step) for a, s, step in zip(row_axes(axes), starts, steps, strict=True)
        }
        yield shard.read(tuple(index.get(a, keep if a == "L" else slice(None)) for a in axes))


def _steps(rows: tuple[int, ...], chunks: Sequence[int], n: int) -> list[int]:
    """Choose how far to go along each axis of rows: about n rows, in whole chunks, in order."""
    inner = max(math.prod(rows[1:]), 1)
    if len(rows) == 1 or n >= inner:
        return [_whole(max(n // inner, 1), chunks[0]), *rows[1:]]
    return [1, _whole(n, chunks[1])]


def _whole(n: int, chunk: int) -> int:
    return max(n // chunk, 1) * chunk


def _in_order(part: npt.NDArray[Any], axes: Axes, layer: int | None) -> npt.NDArray[Any]:
    order = [*row_axes(axes), *(a for a in "LD" if a in axes)]
    turned = part.transpose([axes.index(a) for a in order])
    n = math.prod(turned.shape[: len(row_axes(axes))])
    rest = [size for a, size in zip(order, turned.shape, strict=True) if a == "D" or (a == "L" and layer is None)]  # fmt: skip
    return np.ascontiguousarray(turned).reshape(n, *rest)


# Row streams: files of arrays, or globs of shards of them, read in order without holding them.


_READ_BYTES = 32 * 2**20


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
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def shape(self) -> str:
        """Shape of the whole, for messages."""
        return str((self.n_rows, *self.row_shape))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds the values of every shard."""
        return np.result_type(*{shard.dtype for shard in self.shards})

    def row_of(self, row: int) -> str:
        """Name an input row, and its shard where there are several."""
        if len(self.shards) == 1:
            return f"row {row}"
        start = 0
        for shard in self.shards:
            if row < start + shard.shape[0]:
                return f"row {row} (row {row - start} of '{shard.path}')"
            start += shard.shape[0]
        return f"row {row}"

    def batches(self, n: int) -> Blocks:
        """Read all rows in order, exactly `n` at a time but for the last."""
        held: list[npt.NDArray[Any]] = []
        count = 0
        for shard in self.shards:
            for block in _intact(shard, self.what, n):
                held.append(block)
                count += len(block)
                while count >= n:
                    whole = held[0] if len(held) == 1 else np.concatenate(held)
                    yield whole[:n]
                    held, count = [whole[n:]], count - n
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
    found = tuple(shards)
    odd = next((s for s in found if s.shape[1:] != found[0].shape[1:]), None)
    if odd is not None:
        raise DataError(
            f"shard '{odd.path}' with rows of shape {odd.shape[1:]}",
            f"{found[0].shape[1:]}, as in '{found[0].path}'",
        )
    return RowStream(what, found)


def find_paths(source: str, what: str) -> tuple[list[str], str | None]:
    """Part a source into the paths that are there and the name of an array in them.

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
    colons = [at.start() for at in re.finditer(":", source)]
    for end in [len(source), *colons]:
        path, key = source[:end], source[end + 1 :] or None
        if path and Path(path).exists():
            return [path], key
    for end in [*colons, len(source)]:
        paths = sorted(glob.glob(source[:end]), key=natural_key)
        if paths:
            return paths, source[end + 1 :] or None
    raise DataError(f"no {what} at '{source}'", "an existing file, or a glob of shards")


def _intact(shard: Shard, what: str, n: int) -> Blocks:
    """Read a shard block by block; damage is named."""
    blocks = shard.blocks(n)
    while True:
        with readable(shard.path, what):
            block = next(blocks, None)
        if block is None:
            return
        yield block


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
