"""What can be asked of `measure`, `plan` and `grid`, declared once.

An option is a field with its sentence, and its use. The command line, the checks, the record in
results, ``help(nc.measure)`` and docs/options.md follow; ``python -m tests.generated`` writes what
is a file.
"""

# Without `from __future__ import annotations`: the annotations are read as the objects they are.

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ncbatch.engine.options import Declared, Limits, options_of
from ncbatch.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client

Attributes = dict[str, str | int | float]


@dataclass(frozen=True)
class Recorded:
    """Marks an option on which values depend: results record it, as an attribute.

    Attributes
    ----------
    name : str
        The attribute; the option's own name where it is empty.
    tell : callable, optional
        Makes the attribute of all options; None is not recorded. By default the option's value.
    """

    name: str = ""
    tell: Callable[["Options"], str | int | float | None] | None = None


def _global_mean(options: "Options") -> str:
    return "mean of samples" if options.weighted else "unweighted mean of class means"


def _class_filter(options: "Options") -> str | None:
    if options.classes is None:
        return None
    listed = array("q", sorted({int(c) for c in options.classes}))
    digest = hashlib.sha256(listed.tobytes()).hexdigest()[:32]
    return f"{len(listed)} listed, sha256 {digest}"


@dataclass(frozen=True, kw_only=True)
class Options(Declared):
    """How to measure: all that values depend on. It goes to every worker.

    Attributes
    ----------
    train
        Split of the class means.
    test
        Split that NC4 is measured on; by default ``test`` where it exists. Without a test split
        NC4 takes the samples of `train`.
    ood
        Split of outside data for NC5; by default ``ood`` where it exists.
    metrics
        Names of metrics, as ``ncbatch metrics`` lists them; by default all that apply.
    min_count
        Use only classes with at least so many train samples.
    max_count
        Use only classes with at most so many train samples.
    classes
        Use only these classes. A filter drops the samples of all other classes, in test too.
    weighted
        Take m_G as the mean of samples instead of the unweighted mean of class means.
    dist_exp
        Exponent p of the CDNV; language-model papers use 2.
    ddof
        V_c is divided by n_c - ddof, S_W by N - ddof K. With 1 a class of one sample has no
        V_c: it is left out of what reads V_c, and counted.
    class_ddof
        Variances over classes are divided by K - class_ddof.
    divide_by_k
        Divide nc1_pinv and nc1_svd by K.
    skip_nonfinite
        Leave out and count rows with NaN or infinities instead of refusing them.
    precision
        Float64 products, or products of residuals in float32 (on a GPU also TF32) folded in
        float64, good to 1e-6 for traces.
    null
        Measure NC1, NC2 and spectra also for labels drawn at random from the label
        distribution, in the same read, as ``<metric>_null``.
    null_seed
        Which draw of those labels.
    per_class
        Give results per class too, over the dim ``class`` (.zarr, .nc).
    ncc
        Who seeks the nearest class mean; the decisions are the same.
    device
        Where to compute; ``auto`` takes the GPU when CuPy and one work.
    """

    train: Annotated[str, Recorded()] = "train"
    test: str | None = None
    ood: str | None = None
    metrics: Iterable[str] | None = None
    min_count: Annotated[int, Limits(1), Recorded()] = 1
    max_count: Annotated[int | None, Limits(1), Recorded()] = None
    classes: Annotated[Iterable[int] | None, Recorded("class_filter", _class_filter)] = None
    weighted: Annotated[bool, Recorded("global_mean", _global_mean)] = False
    # Greater exponents of distances leave the range of float64 on ordinary data.
    dist_exp: Annotated[
        float, Limits(0, 16), Recorded(tell=lambda options: float(options.dist_exp))
    ] = 1.0
    ddof: Annotated[int, Limits(0, 1), Recorded()] = 0
    class_ddof: Annotated[int, Limits(0, 1), Recorded()] = 1
    divide_by_k: Annotated[
        bool, Recorded("nc1_division", lambda options: "by K" if options.divide_by_k else "none")
    ] = True
    skip_nonfinite: Annotated[bool, Recorded(tell=lambda options: int(options.skip_nonfinite))] = (
        False
    )
    precision: Annotated[Literal["exact", "fp32", "tf32"], Recorded()] = "exact"
    null: bool = False
    null_seed: Annotated[int, Recorded(tell=lambda o: o.null_seed if o.null else "no null")] = 0
    per_class: bool = False
    ncc: Annotated[Literal["exact", "faiss"], Recorded()] = "exact"
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class PlanRequest(Options):
    """What `plan` may be asked: how to measure, and what there is to do it with.

    Attributes
    ----------
    memory
        Ceiling of resident memory of each worker, such as ``8GiB``; by default what the machine
        has left, shared by its workers.
    """

    memory: str | int | None = None
    cluster: Annotated[
        "str | os.PathLike[str] | Client | None",
        "Where tasks run: ``sync`` (a plain loop in this process), ``threads``, ``processes``, "
        "``cuda`` (or ``processes:4``), the tcp:// or tls:// address of a scheduler that runs, its "
        "file, or in Python a client.",
    ] = "sync"

    @property
    def options(self) -> Options:
        """The part that goes to workers."""
        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})


@dataclass(frozen=True, kw_only=True)
class MeasureRequest(PlanRequest):
    """What `measure` may be asked.

    Attributes
    ----------
    state
        A directory that keeps finished work: the same call goes on after a crash to the same
        bits, and other metrics of the same states read nothing again. Workers must reach it.
    partial
        Take splits whose writing was interrupted as they are. Without it a note says so, and
        where results are to be saved or updated they are refused.
    collapse_below
        Collapse sets in at the first layer, in order of depth, whose nc1_cdnv is under this; by
        default 0.1 where `dist_exp` is 1.
    """

    state: str | os.PathLike[str] | None = None
    update: Annotated[
        "xr.Dataset | str | os.PathLike[str] | None",
        "Earlier results, .zarr or .nc. What they hold of the same data by the same version is "
        "taken from there, the rest is measured, and the result is the union of both.",
    ] = None
    partial: bool | None = None
    collapse_below: Annotated[float | None, Limits(0)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.collapse_below is None or self.metrics is None or "nc1_cdnv" in self.metrics:
            return
        raise UsageError(
            "collapse_below without metric nc1_cdnv", "it among the metrics", "add it to --metrics"
        )


def records(declaration: type[Options] = Options) -> dict[str, Recorded]:
    """List what results record, by the option that it tells of."""
    return {
        option.name: mark
        for option in options_of(declaration)
        for mark in option.marks
        if isinstance(mark, Recorded)
    }


def conventions(options: Options) -> Attributes:
    """Tell, as attributes of a Dataset, the options that values depend on."""
    attributes: Attributes = {}
    for name, record in records().items():
        value = record.tell(options) if record.tell else getattr(options, name)
        if value is not None:
            attributes[record.name or name] = value
    return attributes


# Seen classes, the unweighted mean of class means, covariances over N, torch.std over classes.
_COMMON = {"min_count": 1, "weighted": False, "ddof": 0, "class_ddof": 1}
# Conventions of papers, as arguments of `measure`; defaults are written out, for they may change.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The notebook that Papyan, Han & Donoho published: NC1 not divided by K, and everything on the
    # training samples.
    "papyan2020": {**_COMMON, "dist_exp": 1.0, "divide_by_k": False, "test": "train"},
    # Language models, Wu & Papyan: CDNV with p = 2.
    "wu2024": {**_COMMON, "dist_exp": 2.0, "divide_by_k": True},
}
