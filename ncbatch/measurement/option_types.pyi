"""What PlanRequest and MeasureRequest may be made of. Made by ``python -m tests.generated``."""

import os
from collections.abc import Iterable
from typing import Literal, TypedDict

import xarray as xr
from distributed import Client

class PlanOptions(TypedDict, total=False):
    train: str
    test: str | None
    ood: str | None
    metrics: Iterable[str] | None
    min_count: int
    max_count: int | None
    classes: Iterable[int] | None
    weighted: bool
    dist_exp: float
    ddof: int
    class_ddof: int
    divide_by_k: bool
    skip_nonfinite: bool
    precision: Literal["exact", "fp32", "tf32"]
    null: bool
    null_seed: int
    per_class: bool
    ncc: Literal["exact", "faiss"]
    device: Literal["auto", "cpu", "cuda"]
    memory: str | int | None
    cluster: str | os.PathLike[str] | Client | None

class MeasureOptions(TypedDict, total=False):
    train: str
    test: str | None
    ood: str | None
    metrics: Iterable[str] | None
    min_count: int
    max_count: int | None
    classes: Iterable[int] | None
    weighted: bool
    dist_exp: float
    ddof: int
    class_ddof: int
    divide_by_k: bool
    skip_nonfinite: bool
    precision: Literal["exact", "fp32", "tf32"]
    null: bool
    null_seed: int
    per_class: bool
    ncc: Literal["exact", "faiss"]
    device: Literal["auto", "cpu", "cuda"]
    memory: str | int | None
    cluster: str | os.PathLike[str] | Client | None
    state: str | os.PathLike[str] | None
    update: xr.Dataset | str | os.PathLike[str] | None
    partial: bool | None
    collapse_below: float | None
