"""Spectra: how many directions the features, the class means and the noise use."""

from __future__ import annotations

from collections.abc import Callable

from ncbatch.arrays.namespace import Array, namespace, scalar
from ncbatch.metrics import yardsticks
from ncbatch.metrics.metric import Metric, reads
from ncbatch.metrics.statistics import Statistics, Undefined

_ROY = "Roy & Vetterli 2007, EUSIPCO"
_GAO = "Gao et al. 2017, doi:10.1101/214262"
_RUDELSON = "Rudelson & Vershynin 2007, doi:10.1145/1255443.1255449"
_GARRIDO = "Garrido et al. 2022, arXiv:2210.02885"


def _effective_rank(values: Array) -> float:
    """Exponential of the entropy of the shares."""
    xp = namespace(values)
    shares = values / xp.sum(values)
    shares = shares[shares > 0.0]
    return scalar(xp.exp(-xp.sum(shares * xp.log(shares))))


def _participation(values: Array) -> float:
    xp = namespace(values)
    return scalar(xp.sum(values)) ** 2 / scalar(xp.sum(values * values))


def _stable_rank(values: Array) -> float:
    xp = namespace(values)
    return scalar(xp.sum(values)) / scalar(xp.max(values))


def _of(
    attribute: str, nothing: str, measure: Callable[[Array], float]
) -> Callable[[Statistics], float]:
    def compute(s: Statistics) -> float:
        values: Array = getattr(s, attribute)
        if not scalar(namespace(values).sum(values)) > 0.0:
            raise Undefined(nothing)
        return measure(values)

    return compute


_MATRICES = (
    ("within", "S_W"),
    ("between", "S_B"),
    ("total", "the sample covariance"),
)
_MEASURES = (
    ("erank", "effective rank", "exp(entropy of l / sum l)", _ROY, _effective_rank),
    ("participation", "participation ratio", "(sum l)^2 / sum l^2", _GAO, _participation),
    ("stable_rank", "stable rank", "sum l / max l", _RUDELSON, _stable_rank),
)
_RANDOM = {("between", "participation"): yardsticks.participation}

SPECTRA = (
    *(
        Metric(
            f"spec_{which}_{name}", f"{what} of {matrix}", f"{formula}, l eigenvalues of {matrix}",
            source, reads("scatter"),
            _of(f"{which}_eigenvalues", f"the {which} covariance is zero", measure),
            random=_RANDOM.get((which, name)),
        )
        for which, matrix in _MATRICES
        for name, what, formula, source, measure in _MEASURES
    ),
    Metric(
        "spec_rankme", "RankMe: effective rank of the features",
        "exp(entropy of s / sum s), s singular values of the uncentred samples", _GARRIDO,
        reads("scatter"), _of("raw_singular_values", "all features are zero", _effective_rank),
    ),
)  # fmt: skip
