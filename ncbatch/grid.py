"""Grids: K x K arrays over pairs of classes, written tile by tile for those who want them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ncbatch import __version__
from ncbatch.engine import Job, Progress, Sweep, run_jobs
from ncbatch.errors import DataError, OutputError, UsageError
from ncbatch.metrics import Statistics
from ncbatch.passes import MomentsPass
from ncbatch.results import check_output
from ncbatch.rows import RowSource, count_labels, select_classes
from ncbatch.stats import PairTiles
from ncbatch.store import FeatureStore

KINDS = ("cosine", "distance", "log", "riesz", "cdnv", "interference")
_TILE_CLASSES = 1024


@dataclass(frozen=True)
class Grid:
    """Writes the tiles of a grid, both triangles."""

    pairs: PairTiles
    kind: str
    dist_exp: float
    variances: Any
    grid: zarr.Array[Any]

    def write(self, progress: Progress | None) -> None:
        """Write all tiles, each with its mirror image."""
        tiles = list(self.pairs.tiles(_TILE_CLASSES))
        sizes = [(r.stop - r.start) * (c.stop - c.start) for r, c in tiles]
        if progress:
            progress.begin(f"{self.kind} grid", sum(sizes), "pairs")
        try:
            for (rows, columns), size in zip(tiles, sizes, strict=True):
                values = self._values(rows, columns)
                self.grid[rows, columns] = values
                if rows.start != columns.start:
                    self.grid[columns, rows] = values.T
                if progress:
                    progress.advance(size)
        finally:
            if progress:
                progress.end()

    def _values(self, rows: slice, columns: slice) -> Any:
        if self.kind == "interference":
            return self.pairs.interference(rows, columns)
        if self.kind == "cdnv":
            squares = self.pairs.square_distances(rows, columns)
            apart = self.pairs.apart(rows, columns, squares)
            spread = 0.5 * (self.variances[rows][:, None] + self.variances[columns][None, :])
            return np.where(apart, spread / np.where(apart, squares, 1.0) ** self.dist_exp, np.nan)
        squares = self.pairs.square_distances(rows, columns, directions=True)
        squares = np.where(self.pairs.directed(rows, columns), squares, np.nan)
        if self.kind == "cosine":
            return 1.0 - 0.5 * squares
        if self.kind == "distance":
            return np.sqrt(squares)
        logs = -0.5 * np.log(np.where(squares > 2e-24, squares, np.nan))
        if self.kind == "log":
            return logs
        s = self.pairs.n_features - 2
        with np.errstate(over="ignore"):
            return np.sign(s) * np.exp(s * logs)


def write_grid(
    path: str,
    kind: str,
    layer: str,
    out: str,
    *,
    split: str = "train",
    weighted: bool = False,
    dist_exp: float = 1.0,
    progress: Progress | None = None,
) -> int:
    """Write the K x K grid of a layer's class means, never holding more than a tile.

    Parameters
    ----------
    path : str
        The store.
    kind : {"cosine", "distance", "log", "riesz", "cdnv", "interference"}
        What each pair gets: of directions the first four, of means the others.
    layer, split : str
        Where the class means come from.
    out : str
        A Zarr group to make: ``grid`` (class_i, class_j) of float64, and ``class`` with the ids of
        the classes that have samples. NaN where there is no value: pairs without a direction,
        coincident pairs, and the diagonal of ``log``, ``riesz`` and ``cdnv``.
    weighted : bool, optional
        Take m_G as the mean of samples.
    dist_exp : float, optional
        Exponent p of ``cdnv``.
    progress : Progress, optional
        Told how far it is.

    Returns
    -------
    int
        The classes on a side.

    Raises
    ------
    OutputError
        When something is at `out`, or its folder is missing.
    """
    if kind not in KINDS:
        raise UsageError(f"grid '{kind}'", ", ".join(KINDS))
    target = Path(out)
    if target.suffix != ".zarr":
        raise OutputError(f"output '{out}'", "a name that ends in .zarr")
    if target.exists():
        raise OutputError(f"'{out}' exists", "a free path")
    check_output(target)
    store = FeatureStore.open(path)
    part = store.split(split)
    part.feature(layer)
    selection = select_classes(count_labels(part))
    if len(selection.classes) < 2:
        raise DataError(f"{len(selection.classes)} class in split '{split}'", "at least 2")
    part.check_chunks(layer)
    source = RowSource(part, layer, selection.index)
    read = MomentsPass(source, len(selection.classes), False, "exact")
    step = Sweep(
        "moments", f"moments of {split}/{layer}", lambda: read, source.items, source.chunk_rows
    )
    moments = run_jobs([Job(layer, (step,))], progress)[0].seen.moments
    statistics = Statistics(moments, weighted=weighted)
    pairs = PairTiles(moments.means, statistics.global_mean, quantities=[])
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        grid = _create(partial, selection.classes, kind, layer, store)
        Grid(pairs, kind, dist_exp, moments.variances, grid).write(progress)
        partial.rename(target)
    except OSError as error:
        raise OutputError(f"'{out}' cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(selection.classes)


def _create(
    path: Path, classes: Any, kind: str, layer: str, store: FeatureStore
) -> zarr.Array[Any]:
    about = {
        "kind": kind,
        "layer": layer,
        "store_id": store.id,
        "producer": f"ncbatch {__version__}",
    }
    group = zarr.create_group(str(path.absolute()), zarr_format=3, attributes=about)
    ids = group.create_array(
        "class", shape=classes.shape, dtype="int64", dimension_names=["class_i"]
    )
    ids[:] = classes
    k = len(classes)
    side = min(k, _TILE_CLASSES)
    return group.create_array(
        "grid", shape=(k, k), chunks=(side, side), dtype="float64",
        dimension_names=["class_i", "class_j"], fill_value=float("nan"),
    )  # fmt: skip
