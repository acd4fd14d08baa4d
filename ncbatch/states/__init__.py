"""States: mergeable summaries of samples. They know no Zarr and no Dask."""

from ncbatch.states.decisions import Decisions
from ncbatch.states.directional import DirectionalVariance
from ncbatch.states.moments import Moments, MomentsAccumulator, SeenMoments
from ncbatch.states.moments_fold import Scratch
from ncbatch.states.null import null_labels, null_scatter
from ncbatch.states.pairs.stats import PAIR_QUANTITIES, Nearest, PairStats, Tally, TopPairs
from ncbatch.states.pairs.sweep import PairTiles, sweep_pairs
from ncbatch.states.rules import FaissRule, Rule, faiss_nearest_rule, linear_rule, nearest_mean_rule

__all__ = [
    "PAIR_QUANTITIES",
    "Decisions",
    "DirectionalVariance",
    "FaissRule",
    "Moments",
    "MomentsAccumulator",
    "Nearest",
    "PairStats",
    "PairTiles",
    "Rule",
    "Scratch",
    "SeenMoments",
    "Tally",
    "TopPairs",
    "faiss_nearest_rule",
    "linear_rule",
    "nearest_mean_rule",
    "null_labels",
    "null_scatter",
    "sweep_pairs",
]
