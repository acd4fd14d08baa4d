"""A rule: the class of greatest score for each row, decided as exact arithmetic would."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import array_api_compat.numpy
import numpy as np
import numpy.typing as npt
from array_api_compat import device, is_cupy_array, is_numpy_array, is_torch_array

from ncbatch.arrays.namespace import Array, as_float64, namespace, scalar, to_numpy, zeros
from ncbatch.arrays.rows import (
    CentredRows,
    block_rows,
    float64_blocks,
    mean_of_rows,
    row_blocks,
    square_norms,
    take_rows,
)
from ncbatch.arrays.threads import cpu_count, map_threads, max_pending
from ncbatch.errors import UsageError
from ncbatch.states.fold import detached

# The sweep: best and second best score of each row over tiles of classes, never rows x classes.

# Rows and classes of a tile of scores: products of this size run at nearly full speed.
TILE_ROWS = 2048
TILE_CLASSES = 2048
_COMPILED_ROWS = 1024
# Rows that one compiled sweep over classes in memory takes at a time.
_SWEEP_ROWS = 8192
# A converted tile of classes that are not in memory as they are multiplied.
_CONVERTED_BYTES = 32 * 2**20
# Scores whose maximum is taken at once, so that a tile is gone over once.
RUN = 64
# What the compiler holds when it has just compiled the scan.
COMPILER_BYTES = 160 * 2**20


class Tiling(NamedTuple):
    """How a sweep over classes works.

    Attributes
    ----------
    sweep_rows : int
        Rows that share one sweep.
    rows, classes : int
        Rows and classes of a tile of scores.
    compiled : bool
        Whether tiles of NumPy arrays are scanned by compiled code.
    """

    sweep_rows: int
    rows: int
    classes: int
    compiled: bool

    @classmethod
    def of(
        cls, n_rows: int, shape: tuple[int, int], itemsize: int, *, compiled: bool, converted: bool
    ) -> Tiling:
        """Choose tiles for `n_rows` rows and classes (C, D).

        Parameters
        ----------
        n_rows : int
            Rows to decide.
        shape : (int, int)
            C and D.
        itemsize : int
            Bytes of a number in the products.
        compiled : bool
            Whether compiled code can work on the tiles; it does where there are enough classes.
        converted : bool
            Whether classes are read or converted tile by tile; then all rows share one sweep.
        """
        classes = TILE_CLASSES
        if converted:
            classes = min(classes, max(64, _CONVERTED_BYTES // (shape[1] * itemsize)))
        if not compiled or shape[0] <= COMPILED_CLASSES:
            return cls(TILE_ROWS, TILE_ROWS, classes, False)
        return cls(n_rows if converted else _SWEEP_ROWS, _COMPILED_ROWS, classes, True)


class Leaders(NamedTuple):
    """Arrays (B,): the best score of each row, the position of its class, and the second best.

    The lowest of equal classes leads; the second best is -inf where there is one class only.
    """

    best: Array
    at: Array
    second: Array


def class_tiles(
    weight: Array, bias: Array, like: Array, tile_classes: int
) -> Iterator[tuple[int, Array, Array]]:
    """Read the classes tile by tile: the first's position, weights and biases.

    Parameters
    ----------
    weight : array (C, D) or view
        Score vectors of any floating-point dtype.
    bias : array (C,)
        Score offsets.
    like : array
        An array in the dtype of the products.
    tile_classes : int
        Classes of a tile.
    """
    xp = namespace(like)
    for part in row_blocks(weight.shape[0], tile_classes):
        block = xp.astype(take_rows(weight, part), like.dtype, copy=False)
        yield part.start, block, xp.astype(bias[part], like.dtype)


def sweep_arrays(rows: Array, weight: Array, bias: Array, tile_classes: int) -> Leaders:
    """Find the leaders of rows (B, D), in any array library.

    Nothing is brought to the host, so that a GPU never waits between tiles.
    """
    xp = namespace(rows)
    best = xp.full((rows.shape[0],), -xp.inf, dtype=rows.dtype, device=device(rows))
    second = best
    at = zeros((rows.shape[0],), rows, "int64")
    for first, block, offsets in class_tiles(weight, bias, rows, tile_classes):
        scores = xp.matmul(rows, xp.matrix_transpose(block)) + offsets[None, :]
        top, runner_up, top_at = _top_two(scores)
        # Of the tile's two and the two so far, the second greatest.
        second = xp.maximum(xp.minimum(best, top), xp.maximum(second, runner_up))
        # Strictly: of equal scores the first tile's stays, which has the lower class.
        better = top > best
        at = xp.where(better, top_at + first, at)
        best = xp.where(better, top, best)
    return Leaders(best, at, second)


def _top_two(scores: Array) -> tuple[Array, Array, Array]:
    """Find the greatest score of each row, the next one, and where the first is."""
    xp = namespace(scores)
    n_rows, n_columns = scores.shape
    if missing := -n_columns % RUN:
        shape = (n_rows, missing)
        filler = xp.full(shape, -xp.inf, dtype=scores.dtype, device=device(scores))
        scores = xp.concat([scores, filler], axis=1)
    runs = xp.reshape(scores, (n_rows, -1, RUN))
    tops = xp.max(runs, axis=2)
    run_at = xp.argmax(tops, axis=1)
    # The run that holds the maximum: the only one looked at again.
    index = xp.broadcast_to(run_at[:, None, None], (n_rows, 1, RUN))
    run = xp.take_along_axis(runs, index, axis=1)[:, 0, :]
    within = xp.argmax(run, axis=1)
    second = xp.maximum(_others(tops, run_at), _others(run, within))
    at = xp.astype(run_at, xp.int64) * RUN + xp.astype(within, xp.int64)
    return xp.max(tops, axis=1), second, at


def _others(values: Array, left_out: Array) -> Array:
    """Find the maximum of each row without one of its columns."""
    xp = namespace(values)
    columns = xp.arange(values.shape[1], dtype=left_out.dtype, device=device(values))
    rest = xp.where(columns[None, :] == left_out[:, None], -xp.inf, values)
    return xp.max(rest, axis=1)


def sweep_compiled(
    rows: npt.NDArray[Any],
    weight: Array,
    bias: npt.NDArray[Any],
    tile_rows: int,
    tile_classes: int,
) -> Leaders:
    """Find the leaders of rows (B, D) in memory, on all processors.

    The tiles of scores are dealt out to threads; tiles of classes are read or converted while
    others are worked on. What is found does not depend on threads: tiles do not, and neither do
    the leaders on the order in which tiles are folded in.
    """
    # numba is loaded only where a sweep runs: it takes longer than measuring a small store.
    from ncbatch.states.rules_kernel import scan_tile

    best = np.full(len(rows), -np.inf, rows.dtype)
    leaders = Leaders(best, np.zeros(len(rows), np.int64), best.copy())
    parts = [(part, threading.Lock()) for part in row_blocks(len(rows), tile_rows)]

    def fold(task: tuple[Any, ...]) -> None:
        (part, lock), (first, block, offsets) = task
        scores = rows[part] @ block.T
        # Tiles of classes come in any order; the leaders of a row are one thread's at a time.
        with lock:
            scan_tile(scores, offsets, first, Leaders(*(values[part] for values in leaders)))

    tiles = class_tiles(weight, bias, rows, tile_classes)
    deque(map_threads(fold, ((part, tile) for tile in tiles for part in parts)), maxlen=0)
    return leaders


# Near-ties: the classes that rounding leaves in doubt, decided from float64 scores.

# Bytes of the rows, and of the score vectors, of pairs that are scored at a time.
_PAIR_BYTES = 4 * 2**20
# Scores of a tile that is searched for candidates.
LISTED_SCORES = 2**19


# ``exact(rows, k)`` scores row r of (R, D) for the class at position k[r] in float64, on the host.
ExactScores = Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]]


def pair_rows(n_features: int) -> int:
    """Count the pairs that are scored at a time."""
    return max(1, min(2048, _PAIR_BYTES // (8 * n_features)))


def candidates(
    rows: Array, weight: Array, bias: Array, floor: Array, most_classes: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Find every class whose score reaches `floor`, tile by tile.

    Parameters
    ----------
    rows : array (R, D)
        Rows in the dtype of the products.
    weight, bias : array (C, D) and (C,)
        The scores' vectors and offsets.
    floor : array (R,) of float64
        The least score that counts; -inf where every class does.
    most_classes : int
        Classes of a tile at most, such as where they are read or converted.

    Yields
    ------
    tuple of two arrays (P,)
        Rows and positions of classes, on the host; as many as are scored at a time.
    """
    xp = namespace(rows)
    info = xp.finfo(rows.dtype)
    # Rounded down: a candidate may be one too many, never one too few.
    floor = floor - 2.0 * float(info.eps) * xp.abs(floor) - float(info.smallest_normal)
    floor = xp.astype(floor, rows.dtype)
    for part in row_blocks(rows.shape[0], 1024):
        n_rows = part.stop - part.start
        tile = min(max(LISTED_SCORES // n_rows, 1), most_classes)
        for first, block, offsets in class_tiles(weight, bias, rows, tile):
            scores = xp.matmul(rows[part, :], xp.matrix_transpose(block)) + offsets[None, :]
            row, k = (to_numpy(index) for index in xp.nonzero(scores >= floor[part, None]))
            for pairs in row_blocks(len(row), pair_rows(rows.shape[1])):
                yield row[pairs] + part.start, k[pairs] + first


def score_vectors(rows: Array, k: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Read rows (C, D) at positions k (P,), in any order, as float64 on the host."""
    numbers, back = np.unique(k, return_inverse=True)
    vectors = take_rows(rows, namespace(rows).asarray(numbers, device=device(rows)))
    return np.asarray(to_numpy(vectors), dtype=np.float64)[back]


# With fewer classes the scan takes less time than loading compiled code.
COMPILED_CLASSES = 2048
FLOAT64_ROUNDOFF = float(np.finfo(np.float64).eps) / 2


@dataclass(frozen=True)
class Rule:
    """Chooses the class of greatest score ``w_k . (x - origin) + b_k``, as exact arithmetic would.

    Attributes
    ----------
    weight : array (C, D) or view of rows
        Score vectors; tiles of them are converted to `dtype` where they have another.
    bias : array (C,) of float64
        Score offsets; -inf for a class that is never chosen.
    origin : array (D,) of float64
        Subtracted from every row, so that a common offset costs no digits.
    classes : array (C,) of int64
        The class id of each score, ascending: equal scores go to the lowest.
    exact : callable
        ``exact(rows, k) -> (R,)`` scores row r for candidate k[r] in float64 on the host.
    dtype : dtype
        What products run in: float32 or float64.
    bias_error : float
        Rounding error that computing `bias` left in it, beyond its own relative one.
    tiling : Tiling, optional
        How to go over the classes; by default what suits the processors.
    operand_roundoff : float
        Unit of rounding of the products' operands where it is coarser than that of `dtype`:
        2**-11 for TF32.
    """

    weight: Array
    bias: Array
    origin: Array
    classes: Array
    exact: ExactScores
    dtype: Any
    bias_error: float = 0.0
    tiling: Tiling | None = None
    operand_roundoff: float = 0.0

    @staticmethod
    def peak_bytes(
        n_classes: int, n_features: int, block_rows: int, itemsize: int = 4, *, stored: bool = False
    ) -> int:
        """Price the rule and its decisions of a block: bytes at their peak, on the CPU.

        Parameters
        ----------
        n_classes, n_features : int
            C and D.
        block_rows : int
            Rows that are decided at a time.
        itemsize : int, optional
            Bytes of a number in the products.
        stored : bool, optional
            Whether score vectors are read, or converted, tile by tile and never held.
        """
        shape = (n_classes, n_features)
        tiles = Tiling.of(block_rows, shape, itemsize, compiled=True, converted=stored)
        rows = min(block_rows, tiles.sweep_rows)
        held = n_classes * (24 + (0 if stored else n_features * itemsize))
        block = rows * (n_features * itemsize + 64) + block_rows * 32
        centred = 3 * 8 * min(max(rows, n_classes), _rows_at_a_time(n_features)) * n_features
        # Candidates are listed once the sweep's tiles are gone, but their memory may stay.
        listed = LISTED_SCORES * (itemsize + 33) + 4 * 8 * pair_rows(n_features) * n_features
        if tiles.compiled:
            sweep = cpu_count() * min(rows, tiles.rows) * tiles.classes * itemsize + COMPILER_BYTES
            # Leaders, and the rows in doubt among them.
            sweep += rows * 8 * (itemsize + 8)
            if stored:
                alive = max_pending() // -(-max(rows, 1) // tiles.rows) + 2
                sweep += tiles.classes * n_features * (alive * itemsize + 16)
        else:
            classes = min(n_classes, tiles.classes)
            sweep = min(rows, tiles.rows) * classes * itemsize * 3
            sweep += classes * n_features * (itemsize + 16) if stored else 0
        return held + block + centred + listed + sweep

    def decide(self, features: Array) -> Array:
        """Choose a class for each row of `features` (B, D): ids (B,) of int64.

        Notes
        -----
        Scores are computed tile by tile with the two best of every row so far, in float32 as a
        rule. With unit of rounding u, a dot product of D terms errs by at most
        ``gamma_D |w| |x|``, ``gamma_n = n u / (1 - n u)``, in whatever order it is summed [1]_;
        rounding w and x adds 2 u |w| |x|, and b_k with its addition 2 u (|b_k| + |w| |x|). Rows
        whose runner-up lies within twice that of the best, for the longest w and the largest b,
        are decided again from float64 scores of every class that does.

        References
        ----------
        .. [1] N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002,
           section 3.1.
        """
        if features.shape[0] == 0:
            return self.classes[:0]
        size = self._tiles(features).sweep_rows
        # Rows that share a sweep share its tiles of classes, read or converted once.
        blocks = [self._decide_sweep(features[p, :]) for p in row_blocks(features.shape[0], size)]
        return namespace(features).concat(blocks) if len(blocks) > 1 else blocks[0]

    def _decide_sweep(self, features: Array) -> Array:
        xp = namespace(features)
        rows, norms, wide = self._centred(features)
        leaders = self._leaders(rows)
        floor = xp.where(wide, -xp.inf, as_float64(leaders.best) - 2.0 * self._error(norms))
        chosen = xp.take(self.classes, leaders.at, axis=0)
        doubt = as_float64(leaders.second) >= floor
        # The one time per sweep that a GPU is waited for.
        if bool(xp.any(doubt)):
            chosen[doubt] = self._decide_exactly(features[doubt], rows[doubt], floor[doubt])
        return chosen

    def _decide_exactly(self, features: Array, rows: Array, floor: Array) -> Array:
        """Decide rows by float64 scores of every class whose product reaches `floor`."""
        xp = namespace(features)
        host = np.ascontiguousarray(to_numpy(features))
        # A row of zeros ties with every class: it is scored once, not once per copy.
        keys = host.view(np.dtype((np.void, host.dtype.itemsize * host.shape[1])))[:, 0]
        _, first, copies = np.unique(keys, return_index=True, return_inverse=True)
        numbers = xp.asarray(first, device=device(features))
        rows = xp.take(rows, numbers, axis=0)
        floor = xp.take(floor, numbers, axis=0)
        best = np.full(len(first), -np.inf)
        at = np.zeros(len(first), np.int64)
        most = self._tiles(rows).classes if self._converted else self.weight.shape[0]
        for row, k in candidates(rows, self.weight, self.bias, floor, most):
            scores = self.exact(host[first[row]].astype(np.float64), k)
            before = best.copy()
            np.fmax.at(best, row, scores)
            # Equal scores go to the lowest class; a better one begins anew.
            at[best > before] = self.weight.shape[0]
            leads = scores == best[row]
            np.minimum.at(at, row[leads], k[leads])
        return xp.take(self.classes, xp.asarray(at[copies], device=device(features)), axis=0)

    def _leaders(self, rows: Array) -> Leaders:
        tiles = self._tiles(rows)
        if tiles.compiled:
            return sweep_compiled(rows, self.weight, self.bias, tiles.rows, tiles.classes)
        return sweep_arrays(rows, self.weight, self.bias, tiles.classes)

    @property
    def _converted(self) -> bool:
        return bool(self.weight.dtype != self.dtype) or not in_memory(self.weight)

    def _tiles(self, rows: Array) -> Tiling:
        if self.tiling is not None:
            return self.tiling
        itemsize = namespace(rows).finfo(self.dtype).bits // 8
        return Tiling.of(
            rows.shape[0],
            self.weight.shape,
            itemsize,
            compiled=is_numpy_array(rows),
            converted=self._converted,
        )

    def _centred(self, features: Array) -> tuple[Array, Array, Array]:
        """Compute the rows for the products, their lengths, and which are too long for `dtype`.

        Those are zeros; the float64 scores of every class decide them.
        """
        xp = namespace(features)
        shape = tuple(features.shape)
        rows = xp.empty(shape, dtype=self.dtype, device=device(features))
        norms = xp.empty(shape[:1], dtype=xp.float64, device=device(features))
        limit = float(xp.finfo(self.dtype).max) / 16.0
        # On a GPU few large steps are better, and a sweep has few rows.
        at_a_time = _rows_at_a_time(shape[1]) if is_numpy_array(features) else max(shape[0], 1)
        for part in row_blocks(shape[0], at_a_time):
            centred = as_float64(features[part, :]) - self.origin
            norms[part] = xp.sqrt(xp.sum(centred * centred, axis=1))
            # Sixteen times below the largest number, so that no product or sum overflows.
            fits = norms[part] * max(self._reach, 1.0) <= limit
            rows[part, :] = xp.astype(xp.where(fits[:, None], centred, 0.0), self.dtype)
        wide = xp.isfinite(norms) & (norms * max(self._reach, 1.0) > limit)
        return rows, norms, wide

    def _error(self, norms: Array) -> Array:
        """Bound how far scores of rows of lengths `norms` are from those of exact arithmetic."""
        info = namespace(self.bias).finfo(self.dtype)
        n = self.weight.shape[1] + 8
        u = float(info.eps) / 2
        r = self.operand_roundoff
        # Tensor cores cut sums off instead of rounding them.
        n_units = (2 * n if r else n) * u
        relative = n_units / (1.0 - n_units) + 2.0 * r + r * r
        offsets = (4.0 * u + n * FLOAT64_ROUNDOFF) * self._largest_bias + self.bias_error
        underflow = n * float(info.smallest_normal)
        return (relative * self._reach + underflow) * norms + (
            offsets + underflow * (1.0 + self._reach)
        )

    @cached_property
    def _reach(self) -> float:
        """Length of the longest score vector."""
        return longest_row(self.weight)

    @cached_property
    def _largest_bias(self) -> float:
        xp = namespace(self.bias)
        finite = xp.where(xp.isfinite(self.bias), self.bias, 0.0)
        return scalar(xp.max(xp.abs(finite)))


def _rows_at_a_time(n_features: int) -> int:
    return max(block_rows(n_features), 16)


def in_memory(rows: Array) -> bool:
    """Whether rows are an array, not a view or in a file."""
    return hasattr(rows, "__dlpack__")


def longest_row(rows: Array) -> float:
    """Find the length of the longest row."""
    return math.sqrt(scalar(namespace(rows).max(square_norms(rows))))


# Rules: the nearest class mean and the linear classifier.


def _nearness(means: Array, rows: npt.NDArray[Any], k: npt.NDArray[Any]) -> Array:
    """Compute minus the squared distance to class means."""
    apart = rows - score_vectors(means, k)
    return -np.sum(apart * apart, axis=1)


def _logits(
    weight: Array, bias: npt.NDArray[np.float64], rows: npt.NDArray[Any], k: npt.NDArray[Any]
) -> Array:
    """Compute outputs of a linear classifier."""
    return np.sum(rows * score_vectors(weight, k), axis=1) + bias[k]


def nearest_mean_rule(
    means: Array, classes: Array | None = None, *, dtype: Any = None, **how: Any
) -> Rule:
    """Make the rule that chooses the nearest of the class means.

    Parameters
    ----------
    means : array (C, D), StoredRows or a view of either
        Class means. Of an array in memory a centred copy in `dtype` is held; what is in a file is
        read tile by tile.
    classes : array (C,) of int64, optional
        Their class ids, ascending; 0..C-1 by default.
    dtype : optional
        Dtype of the products; float32 by default, which near-ties do not depend on.
    **how
        ``tiling``, ``operand_roundoff``: as for `Rule`.
    """
    means = detached(means)
    xp = namespace(means)
    dtype = dtype or xp.float32
    # Near all means: what they share costs the products no digits.
    origin = mean_of_rows(means)
    weight: Array = CentredRows(means, origin, dtype)
    bias = xp.empty((means.shape[0],), dtype=xp.float64, device=device(means))
    held = None
    if not _in_file(means):
        held = xp.empty(tuple(means.shape), dtype=dtype, device=device(means))
    for part, block in float64_blocks(means):
        centred = block - origin
        bias[part] = -0.5 * xp.sum(centred * centred, axis=1)
        if held is not None:
            held[part, :] = xp.astype(centred, dtype)
    return Rule(
        weight=weight if held is None else held,
        bias=bias,
        origin=origin,
        classes=_ids(means, classes),
        exact=partial(_nearness, means),
        dtype=dtype,
        **how,
    )


def linear_rule(
    weight: Array,
    bias: Array | None = None,
    origin: Array | None = None,
    *,
    dtype: Any = None,
    **how: Any,
) -> Rule:
    """Make the rule of a linear classifier, ``argmax(W x + b)`` over all its rows.

    Parameters
    ----------
    weight : array (K, D), StoredRows or a view of either
        Classifier rows W. An array of `dtype` is used as it is; half precision and rows in a file
        are converted tile by tile; of a wider array a copy in `dtype` is held.
    bias : array (K,), optional
        b; zeros by default.
    origin : array (D,), optional
        A point near the features, such as their mean, around which products run.
    dtype : optional
        Dtype of the products; float32 by default, which near-ties do not depend on.
    **how
        As for `nearest_mean_rule`.
    """
    weight = detached(weight)
    bias = detached(bias)
    xp = namespace(weight)
    n_classes, n_features = weight.shape
    dtype = dtype or xp.float32
    if origin is None:
        origin = zeros((n_features,), weight)
    origin = xp.asarray(origin, dtype=xp.float64, device=device(weight))
    offsets = zeros((n_classes,), weight)
    if bias is not None:
        offsets = offsets + as_float64(bias)
    host_bias = to_numpy(offsets).copy()
    for part, block in float64_blocks(weight):
        offsets[part] = offsets[part] + xp.matmul(block, origin[:, None])[:, 0]
    length = scalar(xp.sqrt(xp.sum(origin * origin)))
    # Half precision is converted tile by tile: half the memory of a copy.
    halves = in_memory(weight) and weight.dtype not in (xp.float32, xp.float64)
    held = weight if halves or _in_file(weight) else xp.astype(weight[:, :], dtype, copy=False)
    return Rule(
        weight=held,
        bias=offsets,
        origin=origin,
        classes=_ids(weight, None),
        exact=partial(_logits, weight, host_bias),
        dtype=dtype,
        bias_error=(n_features + 8) * FLOAT64_ROUNDOFF * longest_row(weight) * length,
        **how,
    )


def _in_file(rows: Array) -> bool:
    while hasattr(rows, "rows"):
        rows = rows.rows
    return not in_memory(rows)


def _ids(rows: Array, classes: Array | None) -> Array:
    xp = namespace(rows)
    if classes is None:
        return xp.arange(rows.shape[0], dtype=xp.int64, device=device(rows))
    return xp.asarray(classes, dtype=xp.int64, device=device(rows))


# The nearest class mean by FAISS: its exact search, with the decisions of the built-in rule.


@dataclass(frozen=True)
class FaissRule(Rule):
    """The rule of the nearest class mean, whose leaders an exact FAISS search finds.

    Attributes
    ----------
    place : {"cpu", "cuda"}
        Where FAISS searches.

    Notes
    -----
    FAISS expands squared distances of float32 rows, ``|x|^2 + |w|^2 - 2 w . x``, so they err by at
    most ``gamma_{D+8} (|x| + |w|)^2``, rounding of x and w included (see `Rule.decide`); that is
    more than the products of the built-in rule do, which find the candidates.
    """

    place: str = "cpu"

    def _leaders(self, rows: Array) -> Leaders:
        faiss = import_faiss(self.place)
        kept = min(2, self.weight.shape[0])
        if self.place == "cpu":
            squares, at = faiss.knn(rows, self.weight, kept)
        elif is_numpy_array(rows):
            squares, at = faiss.knn_gpu(_gpu_resources(), rows, self.weight, kept)
        else:  # tensors of torch are what FAISS takes; they share the memory of CuPy's arrays
            torch = import_module("torch")
            import_module("faiss.contrib.torch_utils")
            tensors = (torch.from_dlpack(rows), torch.from_dlpack(self.weight))
            tensors = faiss.knn_gpu(_gpu_resources(), *tensors, kept)
            torch.cuda.current_stream().synchronize()
            squares, at = map(namespace(rows).from_dlpack, tensors)
        wide = as_float64(rows)
        # In the units of the built-in scores: w . x - |w|^2 / 2.
        norms = namespace(rows).sum(wide * wide, axis=1)[:, None]
        scores = 0.5 * (norms - as_float64(squares))
        # Of one class alone the second best is its own: in doubt, and decided all the same.
        return Leaders(scores[:, 0], at[:, 0], scores[:, kept - 1])

    def _error(self, norms: Array) -> Array:
        info = np.finfo(np.float32)
        n = self.weight.shape[1] + 8
        n_units = n * float(info.eps) / 2
        length = norms + self._reach
        underflow = n * float(info.smallest_normal)
        return 0.5 * (n_units / (1.0 - n_units)) * length * length + underflow * (1.0 + length)


def faiss_nearest_rule(
    means: Array,
    classes: Array | None = None,
    device: str = "cpu",
    **how: Any,
) -> FaissRule:
    """Make the rule that chooses the nearest of the class means, by FAISS.

    Parameters
    ----------
    means : array (C, D) or view
        Class means; a centred float32 copy is held, of means in a file too.
    classes : array (C,) of int64, optional
        Their class ids, ascending; 0..C-1 by default.
    device : {"cpu", "cuda"}, optional
        Where FAISS searches. On the GPU, features and means are NumPy arrays, or CuPy arrays or
        torch tensors of its memory, which need torch.
    **how
        What `nearest_mean_rule` takes.

    Raises
    ------
    UsageError
        When FAISS is not installed, or not for the GPU.
    """
    import_faiss(device)
    if device == "cpu" and namespace(means) is not array_api_compat.numpy:
        raise UsageError("class means that FAISS on the CPU cannot read", "NumPy arrays")
    if (is_cupy_array(means) or is_torch_array(means)) and find_spec("torch") is None:
        raise UsageError(
            "torch is not installed",
            "torch, through which FAISS takes arrays on the GPU",
            "install it with: pip install 'ncbatch[torch]'",
        )
    rule = nearest_mean_rule(means, classes, dtype=namespace(means).float32, **how)
    if not in_memory(rule.weight):
        held = np.empty(rule.weight.shape, np.float32)
        for part in row_blocks(len(held), block_rows(held.shape[1])):
            held[part] = rule.weight[part]
        rule = replace(rule, weight=held)
    return FaissRule(**vars(rule), place=device)


@cache
def _gpu_resources() -> Any:
    return import_module("faiss").StandardGpuResources()


def import_faiss(device: str) -> Any:
    """Import FAISS, for the CPU or for CUDA."""
    if device not in ("cpu", "cuda"):
        raise UsageError(f"FAISS on '{device}'", "cpu or cuda")
    never_both = "never both in one environment"
    try:
        faiss = import_module("faiss")
    except ImportError as error:
        raise UsageError(
            "FAISS is not installed",
            "faiss for the nearest class mean by FAISS",
            "install it with: pip install 'ncbatch[faiss]', or for a GPU: "
            f"pip install faiss-gpu-cu12; {never_both}",
        ) from error
    if device == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        raise UsageError(
            "FAISS is installed without its GPU part",
            "faiss-gpu-cu12",
            "install it with: pip uninstall faiss-cpu; pip install faiss-gpu-cu12; " + never_both,
        )
    return faiss
