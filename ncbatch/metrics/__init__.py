"""Neural-collapse formulas: pure functions of arrays and states, and the table of metrics.

The functions take NumPy, CuPy or torch arrays (any array-API library), compute in float64 and
return Python floats, or arrays of the library they were given.
"""

from ncbatch.metrics.by_class import ClassView
from ncbatch.metrics.catalogue import CATALOGUE, find_metrics
from ncbatch.metrics.geometry import structure_error
from ncbatch.metrics.metric import Metric
from ncbatch.metrics.reference import (
    class_dist_norm_vars,
    clf_ncc_agreement,
    covariance_ratio,
    dist_kernel,
    distance_norms,
    interference_grid,
    kernel_grid,
    kernel_stats,
    log_kernel,
    mean_norms,
    orthogonality_deviation,
    riesz_kernel,
    self_duality_error,
    similarities,
    simplex_etf_error,
    variability_cdnv,
)
from ncbatch.metrics.statistics import Statistics, Undefined

__all__ = [
    "CATALOGUE",
    "ClassView",
    "Metric",
    "Statistics",
    "Undefined",
    "class_dist_norm_vars",
    "clf_ncc_agreement",
    "covariance_ratio",
    "dist_kernel",
    "distance_norms",
    "find_metrics",
    "interference_grid",
    "kernel_grid",
    "kernel_stats",
    "log_kernel",
    "mean_norms",
    "orthogonality_deviation",
    "riesz_kernel",
    "self_duality_error",
    "similarities",
    "simplex_etf_error",
    "structure_error",
    "variability_cdnv",
]
