"""Statistics: what metrics are computed from, and the parts that several of them share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ncbatch.arrays import Array, as_float64, namespace, scalar
from ncbatch.metrics.kernels import directions
from ncbatch.metrics.spectrum import Spectrum, between_class_spectrum
from ncbatch.metrics.structure import symmetric_sum
from ncbatch.stats.decisions import Decisions
from ncbatch.stats.directional import DirectionalVariance
from ncbatch.stats.moments import Moments
from ncbatch.stats.pair_tiles import COINCIDENT
from ncbatch.stats.pairs import PairStats


class Undefined(Exception):
    """A metric that has no value here; the message says why."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """The states of one layer, over the classes used.

    Attributes
    ----------
    moments : Moments
        Of the K classes used, each with samples.
    weighted : bool
        Whether m_G weighs classes by their samples.
    pairs : PairStats, optional
        The pair sweep.
    dist_exp : float
        p of the CDNV.
    weight, bias : array (K, D), (K,), optional
        Classifier rows of the classes used.
    decisions : Decisions, optional
        Of the evaluated samples.
    ood_mean : array (D,), optional
        Mean of the out-of-distribution split's class means.
    test : Moments, optional
        Of the test split, over the same classes.
    directional : DirectionalVariance, optional
        Of the train samples.
    """

    moments: Moments
    weighted: bool = False
    dist_exp: float = 1.0
    pairs: PairStats | None = None
    weight: Array | None = None
    bias: Array | None = None
    decisions: Decisions | None = None
    ood_mean: Array | None = None
    test: Moments | None = None
    directional: DirectionalVariance | None = None

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
        xp, means = namespace(self.moments.means), self.moments.means
        return self._sample_mean if self.weighted else xp.mean(means, axis=0)

    @cached_property
    def centred(self) -> Array:
        """Mc = M - m_G (K, D); zeros, not rounding errors, where all means are one."""
        apart = self.moments.means - self.global_mean
        return apart if self.n_directed else namespace(apart).zeros_like(apart)

    @cached_property
    def square_norms(self) -> Array:
        """|Mc_c|^2 (K,)."""
        return namespace(self.centred).sum(self.centred * self.centred, axis=1)

    @cached_property
    def directed(self) -> Array:
        """Which centred means have a direction (K,): those that differ from m_G."""
        means, center = self.moments.means, self.global_mean
        xp = namespace(means)
        size = xp.sum(means**2, axis=1) + xp.sum(center**2)
        return xp.sum((means - center) ** 2, axis=1) > COINCIDENT * size

    @cached_property
    def n_directed(self) -> int:
        """How many centred means have a direction."""
        return int(namespace(self.directed).count_nonzero(self.directed))

    @cached_property
    def norms(self) -> Array:
        """|Mc_c| (K,)."""
        return namespace(self.centred).sqrt(self.square_norms)

    @property
    def within_trace(self) -> float:
        """Tr S_W."""
        traces = self.moments.traces
        return scalar(namespace(traces).sum(traces)) / self.moments.n_samples

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
    def between_covariance(self) -> Array:
        """S_B (D, D)."""
        return symmetric_sum(self.centred) / self.n_classes

    @cached_property
    def within_eigenvalues(self) -> Array:
        """Eigenvalues of S_W."""
        return _eigenvalues(self.moments.within_covariance)

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
        return namespace(self.centred).sqrt(_eigenvalues(self._total(0.0)))

    @property
    def _sample_mean(self) -> Array:
        share = as_float64(self.moments.counts) / self.moments.n_samples
        return namespace(share).matmul(share[None, :], self.moments.means)[0, :]

    def _total(self, center: Array | float) -> Array:
        """Mean of (x - center)(x - center)^T over samples."""
        xp = namespace(self.moments.means)
        root = xp.sqrt(as_float64(self.moments.counts) / self.moments.n_samples)
        rows = (self.moments.means - center) * root[:, None]
        return self.moments.within_covariance + symmetric_sum(rows)

    @property
    def classifier_rows(self) -> Array:
        """The rows w_c (K, D) of the classes used, in float64."""
        if self.weight is None:
            raise Undefined("no classifier")
        return as_float64(self.weight)

    @cached_property
    def dots(self) -> Array:
        """w_c . Mc_c (K,)."""
        return namespace(self.centred).sum(self.classifier_rows * self.centred, axis=1)

    @cached_property
    def aligned(self) -> Array:
        """Which classes have a direction of both w_c and Mc_c (K,)."""
        xp, rows = namespace(self.centred), self.classifier_rows
        return self.directed & (xp.sum(rows * rows, axis=1) > 0.0)

    @cached_property
    def cosines(self) -> Array:
        """cos(w_c, Mc_c) of the classes in `aligned`."""
        rows = directions(self.classifier_rows[self.aligned])
        centred = directions(self.centred[self.aligned])
        return namespace(rows).sum(rows * centred, axis=1)

    @cached_property
    def direction_distances(self) -> Array:
        """|w_c/|w_c| - u_c| of the classes in `aligned`."""
        xp = namespace(self.centred)
        apart = directions(self.classifier_rows[self.aligned]) - directions(
            self.centred[self.aligned]
        )
        return xp.sqrt(xp.sum(apart * apart, axis=1))


def _eigenvalues(matrix: Array) -> Array:
    """Eigenvalues of a covariance, which rounding must not leave below zero."""
    xp = namespace(matrix)
    return xp.clip(xp.linalg.eigvalsh(matrix), 0.0, None)
