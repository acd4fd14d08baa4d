"""Records: nested results as flat numbers and texts, saved as JSON, read and compared.

JSON writes a float in the fewest digits that give its bits again, so that a record holds every
number exactly and a person can read what changed.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import scipy
from threadpoolctl import threadpool_info

FOLDER = Path(__file__).parent / "results"
MACHINE = "machine.json"
# Where libraries or processors differ: relative to a value, and to the largest one beside it.
RTOL, FLOOR = 1e-9, 1e-12
# What is computed from products in float32 has fewer digits that all machines agree on.
RTOL_FLOAT32, FLOOR_FLOAT32 = 1e-5, 1e-7
STRAYS = 3


@dataclass
class Record:
    """The leaves of a result by their path: arrays of floats, and everything else."""

    numbers: dict[str, list[float]]
    texts: dict[str, Any]

    @classmethod
    def of(cls, nested: Mapping[str, Any]) -> Record:
        record = cls({}, {})
        for path, leaf in _leaves("", nested):
            if isinstance(leaf, float):
                record.numbers[path] = [leaf]
            elif isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f":
                # As part of the name, dtype and shape are compared on any machine.
                dtype = "" if leaf.dtype == np.float64 else f" {leaf.dtype}"
                name = f"{path} {'x'.join(map(str, leaf.shape))}{dtype}"
                record.numbers[name] = leaf.astype(np.float64).ravel().tolist()
            elif isinstance(leaf, np.ndarray):
                record.texts[path] = leaf.tolist()
            else:
                record.texts[path] = leaf
        return record

    @classmethod
    def read(cls, path: Path) -> Record:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        parts = []
        for name, leaves in vars(self).items():
            lines = [
                f"  {json.dumps(at)}: {json.dumps(leaf)}" for at, leaf in sorted(leaves.items())
            ]
            parts.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Name what the last bits of a float depend on: processor, and libraries that compute."""
    features = llvmlite.binding.get_host_cpu_features()
    return {
        "processor": f"{platform.machine()} {llvmlite.binding.get_host_cpu_name()}",
        "vectors": [name for name in ("avx2", "fma", "avx512f") if features.get(name)],
        "libc": " ".join(platform.libc_ver()),
        "numpy": np.__version__, "scipy": scipy.__version__, "numba": numba.__version__,
        "blas": sorted(
            f"{each['internal_api']} {each['version']} {each.get('architecture')}"
            for each in threadpool_info()
            # Not those of libraries that other tests load.
            if each["user_api"] == "blas" and _home(each["filepath"]) in ("numpy", "scipy")
        ),
    }  # fmt: skip


def changed_texts(found: Record, recorded: Record) -> list[str]:
    """Say which texts, names, shapes and integers differ; none may, on any machine."""
    names = sorted({*found.texts, *recorded.texts})
    missing = "nothing"
    return [
        f"{name}: {found.texts.get(name, missing)!r}, recorded {recorded.texts.get(name, missing)!r}"
        for name in names
        if name not in found.texts
        or name not in recorded.texts
        or found.texts[name] != recorded.texts[name]
    ]


def changed_numbers(found: Record, recorded: Record, *, exact: bool, float32: bool) -> list[str]:
    """Say which numbers differ: in any bit if `exact`, else by more than rounding."""
    faults = []
    for name in sorted({*found.numbers, *recorded.numbers}):
        if name not in found.numbers or name not in recorded.numbers:
            faults.append(f"{name}: only {'found' if name in found.numbers else 'recorded'}")
            continue
        a, b = np.array(found.numbers[name]), np.array(recorded.numbers[name])
        if a.shape != b.shape:
            faults.append(f"{name}: {len(a)} numbers, recorded {len(b)}")
            continue
        # Numbers of either sign of zero differ, and any two NaN are the same.
        same = (np.isnan(a) & np.isnan(b)) | (a.view(np.int64) == b.view(np.int64))
        if not exact:
            fewer = float32 or "fp32" in name
            rtol, floor = (RTOL_FLOAT32, FLOOR_FLOAT32) if fewer else (RTOL, FLOOR)
            finite = np.abs(b[np.isfinite(b)])
            atol = floor * max(1.0, finite.max(initial=0.0))
            if fewer and "histogram" in name:  # values at the edge of a bin fall to either side
                atol = STRAYS
            same |= np.isclose(a, b, rtol=rtol, atol=atol)
        faults += [f"{name}[{i}]: {a[i]!r}, recorded {b[i]!r}" for i in np.flatnonzero(~same)]
    return faults


def _home(library: str) -> str:
    """Name the package that brings a library."""
    return Path(library).parent.name.removesuffix(".libs")


def _leaves(path: str, nested: Any) -> Iterator[tuple[str, Any]]:
    """Give paths and leaves; a list of numbers only is an array."""
    if isinstance(nested, Mapping):
        for name, part in nested.items():
            yield from _leaves(f"{path}/{name}" if path else str(name), part)
    elif isinstance(nested, (list, tuple)) and not all(isinstance(x, (str, int)) for x in nested):
        for i, part in enumerate(nested):
            yield from _leaves(f"{path}/{i}", part)
    elif isinstance(nested, np.generic):
        yield path, nested.item()
    else:
        yield path, list(nested) if isinstance(nested, tuple) else nested
