"""Axes: what each axis of an array in a file counts, and how its rows are read in order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.formats import Blocks, Shard

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
