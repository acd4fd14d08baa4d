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
from ncbatch.engine.jobs import Job, Price, Progress, counted
from ncbatch.engine.loop import run_jobs
from ncbatch.engine.options import Declared, Limits
from ncbatch.engine.plans import Plan, check_budget, format_bytes, memory_budget, resident_bytes
from ncbatch.errors import BudgetError, OutputError
from ncbatch.measurement.layers import Layer, find_layers, open_stores
from ncbatch.measurement.options import Options, conventions
from ncbatch.measurement.samples import Mode
from ncbatch.measurement.steps import Work, read_moments
from ncbatch.metrics.statistics import Statistics
from ncbatch.results.files import check_output
from ncbatch.states.pairs.sweep import PairTiles
from ncbatch.version import __version__

_TILE_CLASSES = 1024
# Arrays of a tile's size that are held at once: its distances, masks and logarithms, the mirror
# image, and what the codec makes of it.
_TILE_ARRAYS = 12


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
    def source(self) -> Layer:
        """The layer of the class means; finding it reads the labels."""
        options = Options(
            train=self.split,
            # No other split matters, whatever state it is in.
            test=self.split,
            ood=self.split,
            weighted=self.weighted,
            ddof=self.ddof,
            device="cpu",
        )
        (layer,) = find_layers(open_stores(self.path), [self.layer], options, scanned=True)
        return layer

    @cached_property
    def job(self) -> Job:
        """What reads the class means, as for `ncbatch.measure`."""
        return Job(self.source.where, tuple(read_moments(Work(self.source, Mode()))))

    def plan(self) -> Plan:
        """Say what writing it reads, computes, holds and takes on disk; reads labels alone."""
        k = self.source.n_used
        d = self.source.train.n_features
        side = min(_TILE_CLASSES, k)
        n_strips = -(-k // side)
        write = Price(
            f"{self.kind} grid of {k:,} x {k:,}",
            # Means, two blocks of them with what is made of each, and a tile with its temporaries.
            k * (d * 8 + 256) + 8 * min(k, 2 * side) * d * 8 + side * side * 8 * _TILE_ARRAYS,
            flops=k * k * d,
            n_items=n_strips * (n_strips + 1) // 2,
            tile_classes=side,
            disk_bytes=k * k * 8,
        )
        free = shutil.disk_usage(self.target.absolute().parent).free
        note = (
            f"disk: up to {format_bytes(write.disk_bytes)} in '{self.out}', "
            f"of {format_bytes(free)} free"
        )
        prices = [*self.job.prices, write]
        return Plan(prices, resident_bytes(), memory_budget(self.memory), notes=[note])

    def check(self, plan: Plan) -> None:
        """Refuse what does not fit.

        Raises
        ------
        BudgetError
            When memory or disk do not suffice; says what would.
        """
        check_budget(plan, otherwise="")
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
    request.source.train.check_chunks()
    (measured,) = run_jobs([request.job], progress)
    try:
        with replacing(request.target) as temporary:
            grid = _create(temporary, measured.classes, request)
            _fill(grid, measured.statistics, request, progress)
    except OSError as error:
        raise OutputError(f"'{request.out}' cannot be written: {error}") from error
    return len(measured.classes)


def _create(path: Path, classes: Any, request: GridRequest) -> zarr.Array[Any]:
    about = {
        "kind": request.kind,
        "layer": request.layer,
        "split": request.split,
        "global_mean": conventions(request.source.options)["global_mean"],
        "dist_exp": request.dist_exp,
        "ddof": request.ddof,
        "store_id": request.source.store.id,
        "producer": f"ncbatch {__version__}",
    }
    group = zarr.create_group(str(path.absolute()), zarr_format=3, attributes=about)
    group.create_array("class", data=classes, dimension_names=["class_i"])
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


def _fill(
    grid: zarr.Array[Any], statistics: Statistics, request: GridRequest, progress: Progress | None
) -> None:
    """Write all tiles of the upper triangle, each with its mirror image."""
    pairs = PairTiles(statistics.moments.means, statistics.global_mean, quantities=[])
    tiles = list(pairs.tiles(_TILE_CLASSES))
    sizes = [(r.stop - r.start) * (c.stop - c.start) for r, c in tiles]
    with counted(progress, f"{request.kind} grid", sum(sizes), "pairs") as advance:
        for (rows, columns), size in zip(tiles, sizes, strict=True):
            values = _values(pairs, statistics.variances, request, rows, columns)
            grid[rows, columns] = values
            if rows.start != columns.start:
                grid[columns, rows] = values.T
            advance(size)


def _values(
    pairs: PairTiles, variances: Any, request: GridRequest, rows: slice, columns: slice
) -> Any:
    kind = request.kind
    if kind == "interference":
        return pairs.interference(rows, columns)
    if kind == "cdnv":
        squares = pairs.square_distances(rows, columns)
        apart = pairs.apart(rows, columns, squares)
        spread = 0.5 * (variances[rows][:, None] + variances[columns][None, :])
        return np.where(apart, spread / np.where(apart, squares, 1.0) ** request.dist_exp, np.nan)
    squares = pairs.square_distances(rows, columns, directions=True)
    squares = np.where(pairs.directed(rows, columns), squares, np.nan)
    if kind == "cosine":
        return 1.0 - 0.5 * squares
    if kind == "distance":
        return np.sqrt(squares)
    logs = -0.5 * np.log(np.where(squares > 2e-24, squares, np.nan))
    if kind == "log":
        return logs
    s = pairs.n_features - 2
    # Near classes of many features leave float64's range: their energy is infinite.
    with np.errstate(over="ignore"):
        return np.sign(s) * np.exp(s * logs)
