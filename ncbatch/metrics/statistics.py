"""Statistics: what metrics are computed from, and the parts that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ncbatch.arrays.namespace import Array, as_float64, namespace, scalar, to_numpy, zeros
from ncbatch.arrays.rows import (
    CentredRows,
    ChosenRows,
    float64_blocks,
    mean_of_rows,
    product_rows,
    square_gaps,
    take_rows,
)
from ncbatch.metrics.geometry import (
    Spectrum,
    between_class_spectrum,
    directions,
    symmetric_sum,
)
from ncbatch.states.pairs.means import COINCIDENT

if TYPE_CHECKING:
    from ncbatch.states.decisions import Decisions
    from ncbatch.states.directional import DirectionalVariance
    from ncbatch.states.moments import Moments
    from ncbatch.states.pairs.stats import PairStats

# Classifier rows beside class means, compared class by class in one pass over both.


@dataclass(frozen=True)
class Duality:
    """What classifier row w_c and centred mean Mc_c of each class have in common.

    Attributes
    ----------
    squares : array (K,)
        |w_c|^2.
    dots : array (K,)
        w_c . Mc_c.
    cosines : array (K,)
        Of the angle between both; 0 where one is zero.
    distances : array (K,)
        Between their directions; a zero vector stays zero.
    logits : array (K,)
        w_c . m_G.
    """

    squares: Array
    dots: Array
    cosines: Array
    distances: Array
    logits: Array

    @classmethod
    def of(cls, weight: Array, centred: Array, center: Array) -> Duality:
        """Compare classifier rows with centred means, block by block.

        Parameters
        ----------
        weight, centred : array (K, D) or view of rows
            The rows w_c and Mc_c.
        center : array (D,)
            m_G.
        """
        xp: Any = namespace(weight, center)
        duality = cls(*(zeros((centred.shape[0],), center) for _ in fields(cls)))
        for part, mean in float64_blocks(centred):
            row = as_float64(take_rows(weight, part))
            duality.squares[part] = xp.sum(row * row, axis=1)
            duality.dots[part] = xp.sum(row * mean, axis=1)
            duality.logits[part] = xp.sum(row * center, axis=1)
            row = directions(row)
            mean = directions(mean)
            duality.cosines[part] = xp.sum(row * mean, axis=1)
            duality.distances[part] = xp.sqrt(xp.sum((row - mean) ** 2, axis=1))
        return duality


class Undefined(Exception):
    """A metric that has no value here; the message says why."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """The states of one layer, over the classes used.

    Attributes
    ----------
    moments : Moments
        Of the K classes used, each with samples; its means may be a `StoredRows`.
    weighted : bool
        Whether m_G weighs classes by their samples.
    pairs : PairStats, optional
        The pair sweep.
    dist_exp : float
        p of the CDNV.
    weight, bias : array (M, D), (M,), optional
        The classifier; the weight may lie in memory in any floating-point dtype, or be any view
        of rows.
    classes : array (K,) of int, optional
        Which of the classifier's rows belong to the classes used; by default M = K.
    decisions : Decisions, optional
        Of the evaluated samples.
    ood_mean : array (D,), optional
        Mean of the out-of-distribution split's class means.
    test : Moments, optional
        Of the test split, over the same classes.
    directional : DirectionalVariance, optional
        Of the train samples.
    others : mapping of str to object
        What further statistics gave, by name.
    ddof : {0, 1}
        V_c is divided by n_c - ddof, S_W by N - ddof K.
    class_ddof : {0, 1}
        Variances over classes are divided by K - class_ddof.
    divide_by_k : bool
        Whether NC1 by pseudo-inverse is divided by K.
    """

    moments: Moments
    weighted: bool = False
    dist_exp: float = 1.0
    pairs: PairStats | None = None
    weight: Array | None = None
    bias: Array | None = None
    classes: Array | None = None
    decisions: Decisions | None = None
    ood_mean: Array | None = None
    test: Moments | None = None
    directional: DirectionalVariance | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    ddof: int = 0
    class_ddof: int = 1
    divide_by_k: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """K and D."""
        return self.n_classes, self.n_features

    @property
    def n_classes(self) -> int:
        """K, the classes used."""
        return int(self.moments.means.shape[0])

    @property
    def n_features(self) -> int:
        """D."""
        return int(self.moments.means.shape[1])

    @cached_property
    def global_mean(self) -> Array:
        """m_G (D,): the mean of class means, or of samples when `weighted`."""
        return self._sample_mean if self.weighted else mean_of_rows(self.moments.means)

    @cached_property
    def centred(self) -> Array:
        """Mc = M - m_G, a view (K, D) of rows; exact zeros where all means are one."""
        means = self.moments.means
        if self.n_directed:
            return CentredRows(means, self.global_mean)
        zero = zeros((1, self.n_features), means)
        return ChosenRows(zero, zeros((self.n_classes,), means, "int64"))

    @cached_property
    def _squares(self) -> tuple[Array, Array]:
        """|m_c|^2 and |m_c - m_G|^2 (K,)."""
        xp = namespace(self.moments.means)
        sizes = []
        squares = []
        for _, block in float64_blocks(self.moments.means):
            apart = block - self.global_mean
            sizes.append(xp.sum(block * block, axis=1))
            squares.append(xp.sum(apart * apart, axis=1))
        return xp.concat(sizes), xp.concat(squares)

    @property
    def sizes(self) -> Array:
        """|m_c|^2 (K,), uncentred."""
        return self._squares[0]

    @cached_property
    def square_norms(self) -> Array:
        """|Mc_c|^2 (K,)."""
        squares = self._squares[1]
        return squares if self.n_directed else namespace(squares).zeros_like(squares)

    @cached_property
    def directed(self) -> Array:
        """Which centred means have a direction (K,): those that differ from m_G."""
        sizes, squares = self._squares
        of_mean = namespace(sizes).sum(self.global_mean * self.global_mean)
        return squares > COINCIDENT * (sizes + of_mean)

    @cached_property
    def n_directed(self) -> int:
        """How many centred means have a direction."""
        return int(namespace(self.directed).count_nonzero(self.directed))

    @cached_property
    def norms(self) -> Array:
        """|Mc_c| (K,)."""
        return namespace(self.square_norms).sqrt(self.square_norms)

    @property
    def variances(self) -> Array:
        """V_c (K,); NaN with ddof 1 for a class of one sample."""
        n = as_float64(self.moments.counts) - self.ddof
        xp = namespace(n)
        known = n > 0.0
        return xp.where(known, self.moments.traces / xp.where(known, n, 1.0), xp.nan)

    @property
    def n_without_variance(self) -> int:
        """How many classes have no V_c."""
        return int(namespace(self.moments.counts).count_nonzero(self.moments.counts <= self.ddof))

    @property
    def within_scale(self) -> float:
        """N / (N - ddof K): what turns a pooled average over samples into S_W.

        Raises
        ------
        Undefined
            With ddof 1 when no class has two samples.
        """
        n = self.moments.n_samples
        if n <= self.ddof * self.n_classes:
            raise Undefined("no class has two samples, and ddof is 1")
        return n / (n - self.ddof * self.n_classes)

    @property
    def within_covariance(self) -> Array:
        """S_W (D, D)."""
        within = self.moments.within_covariance
        return within if self.within_scale == 1.0 else within * self.within_scale

    @property
    def within_trace(self) -> float:
        """Tr S_W."""
        traces = self.moments.traces
        total = scalar(namespace(traces).sum(traces))
        return total / self.moments.n_samples * self.within_scale

    @property
    def between_trace(self) -> float:
        """Tr S_B.

        Raises
        ------
        Undefined
            When S_B is zero.
        """
        if not self.n_directed:
            raise Undefined("S_B is zero: all class means coincide")
        return scalar(namespace(self.square_norms).sum(self.square_norms)) / self.n_classes

    @cached_property
    def recentred(self) -> bool:
        """Whether m_G is another point than the unweighted mean of class means."""
        counts = self.moments.counts
        return self.weighted and bool(namespace(counts).any(counts != counts[0]))

    @cached_property
    def unweighted_total(self) -> float:
        """Sum of |m_c - m|^2, m the unweighted mean of class means.

        Raises
        ------
        Undefined
            When S_B is zero.
        """
        total = self.between_trace * self.n_classes
        if not self.recentred:
            return total
        # m_G is among the means, so that the difference loses a factor K of digits at most.
        apart = mean_of_rows(self.moments.means) - self.global_mean
        return total - self.n_classes * scalar(namespace(apart).sum(apart * apart))

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenpairs of S_B.

        Raises
        ------
        Undefined
            When S_B is zero.
        """
        if not self.n_directed:
            raise Undefined("S_B is zero: all class means coincide")
        return between_class_spectrum(self.centred)

    @cached_property
    def within_eigenvalues(self) -> Array:
        """Eigenvalues of S_W."""
        return _eigenvalues(self.within_covariance)

    @cached_property
    def between_eigenvalues(self) -> Array:
        """Eigenvalues of S_B that count."""
        return self.spectrum.values

    @cached_property
    def total_eigenvalues(self) -> Array:
        """Eigenvalues of the covariance of all samples."""
        return _eigenvalues(self._total(self._sample_mean))

    @cached_property
    def raw_singular_values(self) -> Array:
        """Singular values of the uncentred samples over sqrt(N)."""
        return namespace(self.directed).sqrt(_eigenvalues(self._total(0.0)))

    @property
    def _sample_mean(self) -> Array:
        share = as_float64(self.moments.counts) / self.moments.n_samples
        xp = namespace(share)
        mean = 0.0
        for part, block in float64_blocks(self.moments.means):
            mean = mean + xp.matmul(share[part][None, :], block)[0, :]
        return mean

    def _total(self, center: Array | float) -> Array:
        """Mean of (x - center)(x - center)^T over samples."""
        share = as_float64(self.moments.counts) / self.moments.n_samples
        between = symmetric_sum(CentredRows(self.moments.means, center), share)
        return self.moments.within_covariance + between

    @cached_property
    def nearest_cdnv(self) -> tuple[Array, Array]:
        """The CDNV of each class with its nearest (K,), and which classes it exists for.

        Raises
        ------
        Undefined
            Without pairs.
        """
        if self.pairs is None or self.pairs.nearest is None:
            raise Undefined("no pairs")
        means = self.moments.means
        index = self.pairs.nearest.index
        # The sweep's distance may come from float32 products: it chose, this measures.
        square = to_numpy(square_gaps(means, ChosenRows(means, np.maximum(index, 0))))
        variances = to_numpy(self.variances)
        sizes = to_numpy(self.sizes)
        spread = 0.5 * (variances + variances[index])
        exists = (index >= 0) & (square > COINCIDENT * (sizes + sizes[index]))
        exists &= np.isfinite(spread)
        return spread / np.where(exists, square, 1.0) ** self.dist_exp, exists

    @property
    def classifier_rows(self) -> Array:
        """The rows w_c (K, D) of the classes used: an array or a view of rows, in any dtype.

        Raises
        ------
        Undefined
            Without a classifier.
        """
        if self.weight is None:
            raise Undefined("no classifier")
        return self.weight if self.classes is None else ChosenRows(self.weight, self.classes)

    @property
    def classifier_bias(self) -> Array | None:
        """The classifier's bias (K,) of the classes used, in float64."""
        if self.bias is None or self.classes is None:
            return None if self.bias is None else as_float64(self.bias)
        return as_float64(namespace(self.bias).take(self.bias, self.classes, axis=0))

    @cached_property
    def duality(self) -> Duality:
        """The classifier's rows beside the centred means."""
        return Duality.of(self.classifier_rows, self.centred, self.global_mean)

    @cached_property
    def aligned(self) -> Array:
        """Which classes have a direction of both w_c and Mc_c (K,)."""
        return self.directed & (self.duality.squares > 0.0)

    @property
    def cosines(self) -> Array:
        """cos(w_c, Mc_c) of the classes in `aligned`."""
        return self.duality.cosines[self.aligned]

    @property
    def direction_distances(self) -> Array:
        """|w_c/|w_c| - u_c| of the classes in `aligned`."""
        return self.duality.distances[self.aligned]

    @staticmethod
    def peak_bytes(n_classes: int, n_features: int, *, scatter: bool) -> int:
        """Price all formulas beside the states: bytes at their peak; no K x D array is among them.

        Parameters
        ----------
        n_classes, n_features : int
            K and D.
        scatter : bool
            Whether metrics that read the within-class covariance are among them.
        """
        square = n_features**2 * 8
        rows = product_rows(n_features)
        # Factors and singular vectors of S_B, or a block, its copies and what they fold into.
        folds = 4 * min(max(rows, n_features) if scatter else rows, n_classes) * n_features * 8
        held = max(12 * square, 6 * square + folds) if scatter else 4 * square + folds
        return held + 2**25 + n_classes * 8 * 24  # 2^25 for tiles and the BLAS


def _eigenvalues(matrix: Array) -> Array:
    """Eigenvalues of a covariance, which rounding must not leave below zero."""
    xp = namespace(matrix)
    return xp.clip(xp.linalg.eigvalsh(matrix), 0.0, None)
