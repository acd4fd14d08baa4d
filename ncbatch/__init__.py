"""Neural collapse metrics on stored features: out of core, one read, exact.

The names below are resolved when first used (PEP 562), so that ``import ncbatch`` stays fast and
loads neither torch, cupy, distributed nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ncbatch.version import __version__ as __version__

if TYPE_CHECKING:
    from ncbatch.errors import NcbatchError
    from ncbatch.ingest.language.dumps import dump_language_model
    from ncbatch.ingest.model.dumps import dump
    from ncbatch.ingest.model.ranks import finalize
    from ncbatch.measurement.run import measure, plan
    from ncbatch.results.files import load_results, save_results
    from ncbatch.results.tables import notes, result_tables
    from ncbatch.results.terminal import ProgressBar
    from ncbatch.states.decisions import Decisions
    from ncbatch.states.moments import Moments, MomentsAccumulator
    from ncbatch.states.pairs.stats import PairStats
    from ncbatch.states.rules import nearest_mean_rule
    from ncbatch.store.feature_store import FeatureStore


_HOMES = {
    "Decisions": "ncbatch.states.decisions",
    "FeatureStore": "ncbatch.store.feature_store",
    "Moments": "ncbatch.states.moments",
    "MomentsAccumulator": "ncbatch.states.moments",
    "NcbatchError": "ncbatch.errors",
    "PairStats": "ncbatch.states.pairs.stats",
    "ProgressBar": "ncbatch.results.terminal",
    "dump": "ncbatch.ingest.model.dumps",
    "dump_language_model": "ncbatch.ingest.language.dumps",
    "finalize": "ncbatch.ingest.model.ranks",
    "load_results": "ncbatch.results.files",
    "measure": "ncbatch.measurement.run",
    "metrics": "ncbatch",
    "nearest_mean_rule": "ncbatch.states.rules",
    "notes": "ncbatch.results.tables",
    "plan": "ncbatch.measurement.run",
    "result_tables": "ncbatch.results.tables",
    "save_results": "ncbatch.results.files",
}

__all__ = [
    "Decisions",
    "FeatureStore",
    "Moments",
    "MomentsAccumulator",
    "NcbatchError",
    "PairStats",
    "ProgressBar",
    "dump",
    "dump_language_model",
    "finalize",
    "load_results",
    "measure",
    "metrics",
    "nearest_mean_rule",
    "notes",
    "plan",
    "result_tables",
    "save_results",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ncbatch' has no attribute '{name}'")
    if home == "ncbatch":
        return importlib.import_module(f"ncbatch.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
