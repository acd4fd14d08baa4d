"""What the benchmark ran on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from threadpoolctl import threadpool_info

_PACKAGES = (
    "ncbatch", "numpy", "scipy", "numba", "zarr", "dask", "distributed", "torch", "transformers", "scikit-learn",
    "faiss-cpu", "faiss-gpu-cu12", "flox", "cupy-cuda12x",
)  # fmt: skip


def about() -> dict[str, Any]:
    """Give date, machine and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.release()}",
            "gpu": gpu_name(),
            "load": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **_versions(), "blas": _blas()},
    }


def gpu_name() -> str | None:
    """Give the name of the GPU; None without one that CuPy can use."""
    import ncbatch as nc
    from ncbatch.arrays.devices import find_device

    try:
        return find_device("cuda").name
    except nc.NcbatchError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} ({platform.machine()})"
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _blas() -> str:
    import numpy as np  # noqa: F401  (its BLAS must be loaded to be seen)

    found = (pool for pool in threadpool_info() if pool["user_api"] == "blas")
    return ", ".join(
        f"{p['internal_api']} {p['version']} {p.get('architecture', '')}" for p in found
    )
