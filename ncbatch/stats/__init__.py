"""States: mergeable summaries of samples. They know no Zarr and no Dask."""

from ncbatch.stats.decisions import Decisions, Rule, linear_rule, nearest_mean_rule
from ncbatch.stats.moments import Moments, MomentsAccumulator
from ncbatch.stats.pairs import PAIR_QUANTITIES, PairStats, Tally

__all__ = [
    "PAIR_QUANTITIES",
    "Decisions",
    "Moments",
    "MomentsAccumulator",
    "PairStats",
    "Rule",
    "Tally",
    "linear_rule",
    "nearest_mean_rule",
]
