"""Grids: K x K arrays over pairs of classes, written tile by tile for those who want them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import zarr

from ncbatch.arrays.atomic import replacing
from ncbatch.engine.jobs import Job, Price, Progress, Sweep
from ncbatch.engine.loop import run_jobs
from ncbatch.engine.options import Declared, Limits
from ncbatch.engine.plans import Plan, format_bytes, memory_budget, resident_bytes
from ncbatch.errors import BudgetError, DataError, OutputError
from ncbatch.measurement.passes import MomentsPass
from ncbatch.measurement.samples import Samples, Selection, count_labels, select_classes
from ncbatch.metrics.statistics import Statistics
from ncbatch.results.files import check_output
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.pairs.sweep import PairTiles
from ncbatch.store.feature_store import FeatureStore
from ncbatch.version import __version__

_TILE_CLASSES = 1024
# Arrays of a tile's size that are held at once: its distances, masks and logarithms, the mirror
# image, and what the codec makes of it.
_TILE_ARRAYS = 12


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


@dataclass(frozen=True)
class GridRequest(Declared):
    """Which grid of which class means, and where to.

    What it makes is a Zarr group: ``grid`` (class_i, class_j) of float64, and ``class`` with the
    ids of the classes that have samples. NaN where there is no value: pairs without a direction,
    coincident pairs, and the diagonal of ``log``, ``riesz`` and ``cdnv``.

    Attributes
    ----------
    path
        The store.
    kind
        What each pair of classes gets: cdnv and interference of the means, the others of their
        directions.
    layer
        Layer of the class means.
    out
        A .zarr that does not exist yet.
    split
        Split of the class means.
    weighted
        Take m_G as the mean of samples.
    dist_exp
        Exponent of cdnv.
    ddof
        V_c of cdnv is divided by n_c - ddof.
    memory
        Ceiling of resident memory, such as ``8GiB``; by default what the machine has left.
    """

    path: str
    kind: Literal["cosine", "distance", "log", "riesz", "cdnv", "interference"]
    layer: str
    out: str
    split: str = "train"
    weighted: bool = False
    dist_exp: float = 1.0
    ddof: Annotated[int, Limits(0, 1)] = 0
    memory: str | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target.suffix != ".zarr":
            raise OutputError(f"output '{self.out}'", "a name that ends in .zarr")
        if self.target.exists():
            raise OutputError(f"'{self.out}' exists", "a free path")
        check_output(self.target)

    @property
    def target(self) -> Path:
        """Where it is written to."""
        return Path(self.out)

    @cached_property
    def store(self) -> FeatureStore:
        """The store."""
        return FeatureStore.open(self.path)

    @cached_property
    def selection(self) -> Selection:
        """The classes that have samples; reads the labels."""
        part = self.store.split(self.split)
        part.feature(self.layer)
        selection = select_classes(count_labels(part))
        if len(selection.classes) < 2:
            raise DataError(f"{len(selection.classes)} class in split '{self.split}'", "at least 2")
        return selection

    @property
    def source(self) -> Samples:
        """The rows of the layer."""
        return Samples(self.store.split(self.split), self.layer, self.selection.index)

    def plan(self) -> Plan:
        """Say what writing it reads, computes, holds and takes on disk; reads labels alone."""
        source = self.source
        part = self.store.split(self.split)
        k = len(self.selection.classes)
        d = source.n_features
        n = part.n_rows
        spec = part.spec(self.layer)
        side = min(_TILE_CLASSES, k)
        itemsize = 8 if spec.dtype == "float64" else 4
        read = Price(
            f"moments of {self.split}/{self.layer}",
            source.read_bytes
            + self.store.n_classes * 32
            + MomentsAccumulator.peak_bytes(
                k, d, source.block_rows, scatter=False, n_rows=n, itemsize=itemsize
            ),
            bytes_read=n * (spec.row_bytes + 4),
            flops=4 * n * d,
            n_items=len(source.items),
            block_rows=source.block_rows,
            n_reads=1,
        )
        n_tiles = -(-k // side) * (-(-k // side) + 1) // 2
        write = Price(
            f"{self.kind} grid of {k:,} x {k:,}",
            # Means, two blocks of them with what is made of each, and a tile with its temporaries.
            k * (d * 8 + 256) + 8 * min(k, 2 * side) * d * 8 + side * side * 8 * _TILE_ARRAYS,
            flops=k * k * d,
            n_items=n_tiles,
            tile_classes=side,
            disk_bytes=k * k * 8,
        )
        free = shutil.disk_usage(self.target.absolute().parent).free
        note = (
            f"disk: up to {format_bytes(write.disk_bytes)} in '{self.out}', "
            f"of {format_bytes(free)} free"
        )
        return Plan([read, write], resident_bytes(), memory_budget(self.memory), notes=[note])

    def check(self, plan: Plan) -> None:
        """Refuse what does not fit.

        Raises
        ------
        BudgetError
            When memory or disk do not suffice; says what would.
        """
        if plan.peak_bytes > plan.budget:
            raise BudgetError(
                f"{self.kind} grid needs {format_bytes(plan.peak_bytes)} resident, the "
                f"interpreter's {format_bytes(plan.base_bytes)} included",
                f"at most {format_bytes(plan.budget)}",
                f"give at least --memory {-(-plan.peak_bytes // 2**20) + 16}MiB",
            )
        free = shutil.disk_usage(self.target.absolute().parent).free
        if plan.disk_bytes > free:
            raise BudgetError(
                f"{self.kind} grid takes up to {format_bytes(plan.disk_bytes)} on disk",
                f"at most {format_bytes(free)}, which are free beside '{self.out}'",
                "write it to another disk",
            )


def write_grid(request: GridRequest, progress: Progress | None = None) -> int:
    """Write the K x K grid of a layer's class means, never holding more than a tile.

    Parameters
    ----------
    request : GridRequest
        Which grid.
    progress : Progress, optional
        Told how far it is.

    Returns
    -------
    int
        The classes on a side.

    Raises
    ------
    BudgetError
        When memory or disk do not suffice, before anything is read or written.
    OutputError
        When it cannot be written.
    """
    request.check(request.plan())
    source = request.source
    classes = request.selection.classes
    source.split.check_chunks(request.layer)
    read = MomentsPass(source, len(classes), False, "exact")
    step = Sweep(
        "moments", f"moments of {request.split}/{request.layer}", lambda: read, source.items
    )
    moments = run_jobs([Job(request.layer, (step,))], progress)[0].moments
    statistics = Statistics(moments, weighted=request.weighted, ddof=request.ddof)
    pairs = PairTiles(moments.means, statistics.global_mean, quantities=[])
    try:
        with replacing(request.target) as temporary:
            grid = _create(temporary, classes, request)
            Grid(pairs, request.kind, request.dist_exp, statistics.variances, grid).write(progress)
    except OSError as error:
        raise OutputError(f"'{request.out}' cannot be written: {error}") from error
    return len(classes)


def _create(path: Path, classes: Any, request: GridRequest) -> zarr.Array[Any]:
    about = {
        "kind": request.kind,
        "layer": request.layer,
        "split": request.split,
        "global_mean": "mean of samples" if request.weighted else "unweighted mean of class means",
        "dist_exp": request.dist_exp,
        "ddof": request.ddof,
        "store_id": request.store.id,
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
        "grid",
        shape=(k, k),
        chunks=(side, side),
        dtype="float64",
        dimension_names=["class_i", "class_j"],
        fill_value=float("nan"),
    )
