"""States: mergeable summaries of samples. They know no Zarr and no Dask."""

from ncbatch.stats.decisions import Decisions
from ncbatch.stats.directional import DirectionalVariance
from ncbatch.stats.faiss_rule import FaissRule, faiss_nearest_rule
from ncbatch.stats.moments import Moments, MomentsAccumulator
from ncbatch.stats.null import null_labels, null_scatter
from ncbatch.stats.pair_tiles import PairTiles, sweep_pairs
from ncbatch.stats.pairs import PAIR_QUANTITIES, Nearest, PairStats, TopPairs
from ncbatch.stats.rule import Rule
from ncbatch.stats.rules import linear_rule, nearest_mean_rule
from ncbatch.stats.scratch import Scratch
from ncbatch.stats.seen import SeenMoments
from ncbatch.stats.tally import Tally

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
