"""Layer: one layer of one store, and how it shall be measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ncbatch.errors import UsageError
from ncbatch.states.moments import Precision

if TYPE_CHECKING:
    pass

# Greater exponents of distances leave the range of float64 on ordinary data.
_MAX_DIST_EXP = 16.0


@dataclass(frozen=True)
class Options:
    """How to measure; the arguments of `measure` under their own names."""

    train: str
    test: str | None
    ood: str | None
    min_count: int
    max_count: int | None
    classes: tuple[int, ...] | None
    weighted: bool
    dist_exp: float
    skip_nonfinite: bool
    precision: Precision
    null: bool
    null_seed: int
    per_class: bool
    ncc: str = "exact"
    device: Literal["cpu", "cuda"] = "cpu"
    ddof: int = 0
    class_ddof: int = 1
    divide_by_k: bool = True

    def __post_init__(self) -> None:
        if self.precision not in ("exact", "fp32", "tf32"):
            raise UsageError(f"precision '{self.precision}'", "exact, fp32 or tf32")
        if not 0.0 < self.dist_exp <= _MAX_DIST_EXP:
            raise UsageError(
                f"dist_exp {self.dist_exp}", f"a number above 0, at most {_MAX_DIST_EXP:g}"
            )
        for name in ("ddof", "class_ddof"):
            if getattr(self, name) not in (0, 1):
                raise UsageError(f"{name} {getattr(self, name)}", "0 or 1")
        if self.ncc not in ("exact", "faiss"):
            raise UsageError(f"ncc '{self.ncc}'", "exact or faiss")


Attributes = dict[str, str | int | float]


def conventions(options: Options) -> Attributes:
    """Give the options that a value depends on, as attributes of a Dataset."""
    attributes: Attributes = {
        "ncc": options.ncc,
        "precision": options.precision,
        "train": options.train,
        "global_mean": "mean of samples" if options.weighted else "unweighted mean of class means",
        "dist_exp": float(options.dist_exp),
        "min_count": options.min_count,
        "skip_nonfinite": int(options.skip_nonfinite),
        "null_seed": options.null_seed if options.null else "no null",
        "nc1_division": "by K" if options.divide_by_k else "none",
        "ddof": options.ddof,
        "class_ddof": options.class_ddof,
    }
    if options.max_count is not None:
        attributes["max_count"] = options.max_count
    if options.classes is not None:
        listed = np.unique(np.asarray(options.classes, np.int64))
        digest = hashlib.sha256(listed.tobytes()).hexdigest()[:32]
        attributes["class_filter"] = f"{len(listed)} listed, sha256 {digest}"
    return attributes


# Conventions of papers, as arguments of `measure`.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The notebook that Papyan, Han & Donoho published: the unweighted mean of class means, covariances
    # over N, NC1 not divided by K, torch.std over classes, and everything on the training samples.
    "papyan2020": {
        "weighted": False, "dist_exp": 1.0, "min_count": 1, "ddof": 0, "class_ddof": 1,
        "divide_by_k": False, "test": "train",
    },
    # Language models, Wu & Papyan: seen classes, unweighted mean of means, CDNV with p = 2.
    "wu2024": {
        "weighted": False, "dist_exp": 2.0, "min_count": 1, "ddof": 0, "class_ddof": 1,
        "divide_by_k": True,
    },
}  # fmt: skip


def _class_ids(classes: Iterable[int] | None) -> tuple[int, ...] | None:
    return None if classes is None else tuple(int(c) for c in classes)


def _check_device(precision: Precision, device: str) -> None:
    if precision == "tf32" and device == "cpu":
        raise UsageError("precision 'tf32' on the CPU", "a GPU for it", "use --precision fp32")
