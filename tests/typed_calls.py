"""Calls that a type checker reads: mypy refuses the wrong ones, and what it ignores needlessly too."""

from __future__ import annotations

import xarray as xr

import ncbatch as nc


def right(stores: list[str]) -> xr.Dataset:
    """Give options as they are declared."""
    nc.plan(stores, ["h.0"], memory="8GiB", cluster="threads", min_count=2)
    nc.dump_language_model("m", "texts", stores[0], labels="next", layers=["h.0"], exclude={0})
    return nc.measure(stores, dist_exp=2, classes=[1, 2], precision="fp32", state="kept")


def wrong(stores: list[str]) -> None:
    """Misspell options, and give them what they cannot be."""
    nc.measure(stores, dist_expp=2)  # type: ignore[call-arg]
    nc.measure(stores, precision="fp16")  # type: ignore[arg-type]
    nc.plan(stores, state="kept")  # type: ignore[call-arg]
    nc.plan(stores, min_count="2")  # type: ignore[arg-type]
    nc.dump_language_model("m", "texts", "s", contxt=8)  # type: ignore[call-arg]
