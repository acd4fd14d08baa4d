"""Neural collapse metrics on stored features: out of core, one read, exact.

The names below are resolved when first used (PEP 562), so that ``import ncbatch`` stays fast and
loads neither torch, cupy, distributed nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Decisions": "ncbatch.stats",
    "FeatureStore": "ncbatch.store",
    "Moments": "ncbatch.stats",
    "NcbatchError": "ncbatch.errors",
    "PairStats": "ncbatch.stats",
    "dump": "ncbatch.ingest",
    "dump_language_model": "ncbatch.ingest",
    "finalize": "ncbatch.ingest",
    "load_results": "ncbatch.results",
    "measure": "ncbatch.measurement",
    "metrics": "ncbatch",
    "plan": "ncbatch.measurement",
    "save_results": "ncbatch.results",
}

__all__ = [
    "Decisions",
    "FeatureStore",
    "Moments",
    "NcbatchError",
    "PairStats",
    "dump",
    "dump_language_model",
    "finalize",
    "load_results",
    "measure",
    "metrics",
    "plan",
    "save_results",
]

if TYPE_CHECKING:
    from ncbatch import metrics
    from ncbatch.errors import NcbatchError
    from ncbatch.ingest import dump, dump_language_model, finalize
    from ncbatch.measurement import measure, plan
    from ncbatch.results import load_results, save_results
    from ncbatch.stats import Decisions, Moments, PairStats
    from ncbatch.store import FeatureStore


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ncbatch' has no attribute '{name}'")
    if home == "ncbatch":
        return importlib.import_module(f"ncbatch.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
