"""States that a store holds finished, in the place of samples: what a dump summed up before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays.rows import StoredRows
from ncbatch.engine.jobs import Call, Price
from ncbatch.errors import DataError
from ncbatch.measurement.samples import (
    Index,
    Mode,
    MomentsRead,
    Reading,
    Samples,
    fill_rows,
    rows_file,
)
from ncbatch.states.decisions import DECISIONS as DECISION_ARRAYS
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import Moments
from ncbatch.store.chunks import check_present, read_rows

if TYPE_CHECKING:
    from ncbatch.store.feature_store import FeatureStore

MOMENTS = "moments"
DECISIONS = "decisions"
# The allocator keeps a freed chunk for each thread that read one.
_CHUNKS_KEPT = 12
_MOMENTS_ARRAYS = ("class", "count", "mean", "trace")


@dataclass(frozen=True)
class Finished:
    """The states that a store holds of a layer of a split in the place of its samples.

    Attributes
    ----------
    store : FeatureStore
        The store.
    name : str
        The split's name.
    layer : str
        Which layer.
    """

    store: FeatureStore
    name: str
    layer: str
    kind: ClassVar[str] = "states"
    wide: ClassVar[bool] = True  # the means are float64, whatever the features were
    by_predictions: ClassVar[bool] = False

    @cached_property
    def _moments(self) -> dict[str, zarr.Array[Any]] | None:
        """The arrays of its moments, opened once: their metadata may be far away."""
        return self.store.state_arrays(self.name, self.layer, MOMENTS)

    @cached_property
    def _decisions(self) -> dict[str, zarr.Array[Any]] | None:
        return self.store.state_arrays(self.name, self.layer, DECISIONS)

    def has(self, kind: str) -> bool:
        """Whether there is a state of that kind."""
        return (self._moments if kind == MOMENTS else self._decisions) is not None

    def _arrays(self, kind: str) -> dict[str, zarr.Array[Any]]:
        arrays = (self._moments if kind == MOMENTS else self._decisions) or {}
        names = _MOMENTS_ARRAYS if kind == MOMENTS else DECISION_ARRAYS
        for name in names:
            if name not in arrays:
                raise self._bad(kind, f"no array '{name}'", ", ".join(names))
        return arrays

    def _attributes(self, kind: str) -> dict[str, Any]:
        return self.store.state_attributes(self.name, self.layer, kind)

    @property
    def where(self) -> str:
        """The store's path, for messages."""
        return self.store.path

    # A state is complete or absent.
    incomplete: ClassVar[str | None] = None

    @property
    def no_samples(self) -> str:
        """Why what reads samples cannot be had."""
        return f"no samples of split '{self.name}', only their moments"

    @property
    def no_moments(self) -> str | None:
        """Why there are no moments."""
        return None if self.has(MOMENTS) else f"no samples and no moments of split '{self.name}'"

    @property
    def n_features(self) -> int:
        """D."""
        return int(self._arrays(MOMENTS)["mean"].shape[1])

    @property
    def most_classes(self) -> int:
        """P, the classes with samples."""
        return int(self._arrays(MOMENTS)["class"].shape[0])

    @property
    def bytes_left(self) -> int:
        """Bytes that reading the means, chunk by chunk, leaves with the allocator."""
        chunks = self._arrays(MOMENTS)["mean"].chunks
        return _CHUNKS_KEPT * int(np.prod(chunks)) * 8

    @property
    def decider(self) -> str:
        """Name whose decisions are stored."""
        by_weights = "classifier_fingerprint" in self._attributes(DECISIONS)
        return f"stored decisions{' by weights' if by_weights else ''}"

    @cached_property
    def moments_fingerprint(self) -> str:
        """Fingerprint of the stored moments alone."""
        return self.store.state_fingerprint(self.name, self.layer, MOMENTS)

    @cached_property
    def deciding_fingerprint(self) -> str | None:
        """Fingerprint of the stored decisions."""
        if not self.has(DECISIONS):
            return None
        return _digest(self.store.state_fingerprint(self.name, self.layer, DECISIONS), "")

    def fingerprint(self, classes: str = "") -> str:
        """Hash the stored checksums of the moments, and the classes used by their digest."""
        return _digest(self.moments_fingerprint, classes)

    def check_chunks(self) -> None:
        """Refuse states of which a chunk is missing; names the first."""
        for arrays in (self._moments, self._decisions):
            for array in (arrays or {}).values():
                check_present(array)

    def check_width(self) -> None:
        """Refuse moments of another width than the layer's classifier; names both."""
        if self.layer not in self.store.classifiers:
            return
        arrays = {array.basename: array for array in self.store.classifier_arrays(self.layer)}
        width = int(arrays["weight"].shape[1])
        if width != self.n_features:
            raise DataError(
                f"moments of layer '{self.layer}' with {self.n_features} features in {self.where}",
                f"{width}, as its classifier there reads",
                "store the moments or the classifier under another layer",
            )

    def is_empty(self, *, scanned: bool) -> bool:
        """Whether there is nothing: a state is of some samples."""
        return False

    def counts(self) -> Index:
        """Read the samples of each class (K,).

        Raises
        ------
        DataError
            When the classes are not ascending ids below K with a sample each.
        """
        arrays = self._arrays(MOMENTS)
        classes = _read(arrays["class"])
        samples = _read(arrays["count"])
        k = self.store.n_classes
        if classes.shape != samples.shape or classes.ndim != 1:
            raise self._bad(
                MOMENTS, f"{samples.shape} counts of {classes.shape} classes", "one per class"
            )
        # `index` and binary searches rely on ascending ids, each once.
        within = not len(classes) or (classes[0] >= 0 and classes[-1] < k)
        if not within or np.any(np.diff(classes) <= 0) or np.any(samples < 1):
            raise self._bad(
                MOMENTS,
                "classes and counts that do not fit",
                f"ascending classes in 0..{k - 1}, each with samples",
            )
        counts = np.zeros(k, np.int64)
        counts[classes] = samples
        return counts

    def no_scatter(self, *, drops_classes: bool) -> str | None:
        """Say why the pooled scatter cannot be had."""
        if "scatter" not in self._arrays(MOMENTS):
            return f"no scatter in the moments of split '{self.name}'"
        if drops_classes:
            return "the pooled scatter of some classes cannot be had from finished moments"
        return None

    def undecided(self, train: Source, *, classifier: bool, drops_classes: bool) -> str | None:
        """Say why there are no decisions by the class means of `train` and the classifier of now.

        Parameters
        ----------
        train : Source
            Where the class means come from.
        classifier : bool
            Whether the layer has one.
        drops_classes : bool
            Whether a class that has samples is not used.
        """
        if not self.has(DECISIONS):
            if not classifier:
                return "no classifier and no predictions"
            return f"no samples and no decisions of split '{self.name}'"
        about = self._attributes(DECISIONS)
        # Means of features have no fingerprint of this kind: nobody can say that they decided.
        means = train.moments_fingerprint if about.get("means_split") == train.name else None
        if means is None or about.get("means_fingerprint") != means:
            return f"decisions of split '{self.name}' are by other class means"
        recorded = about.get("classifier_fingerprint")
        known = self.store.classifier_fingerprint(self.layer) if classifier else None
        if None not in (recorded, known) and recorded != known:
            return f"decisions of split '{self.name}' are by another classifier"
        if drops_classes:
            return f"decisions of split '{self.name}' are among all classes, not some"
        return None

    def moments_call(
        self, reading: Reading, mode: Mode, on_device: bool, rows_at: Path | None
    ) -> Call:
        """Make the step that reads the moments of the classes used, means to a file if so said."""
        d = self.n_features
        square = d**2 * 8 * reading.scatter
        means = min(reading.n_classes, self.most_classes) * d * 8
        # On a cluster the state is held once more as it is sent.
        held = 0 if mode.stored else means * (2 if mode.merged else 1)
        price = Price(
            reading.planned,
            self.bytes_left + self.store.n_classes * 64 + 3 * square + held + reading.beside,
            device_bytes=means + square if on_device else 0,
            # Means, counts, traces and classes.
            bytes_read=self.most_classes * (d * 8 + 24) + square,
            n_reads=1,
            disk_bytes=means if mode.stored else 0,
        )
        compute = partial(self.moments, reading.index, scatter=reading.scatter, rows_at=rows_at)
        return Call(reading.name, compute, price=price)

    def decisions_call(self, label: str, index: Index | None, beside: int) -> Call:
        """Make the step that reads the decisions on samples of the classes used."""
        read = self.store.n_classes * 32
        price = Price(label, beside + 3 * read, bytes_read=read, n_reads=1)
        return Call("decisions", partial(self.decisions, index), price=price)

    def moments(
        self, index: Index | None, *, scatter: bool, rows_at: Path | None = None
    ) -> MomentsRead:
        """Read the moments of the classes used, as a read of the samples would give them.

        Parameters
        ----------
        index : array (K,) or None
            For each class its place among those used, ascending, or -1; None uses all seen.
        scatter : bool
            Whether the pooled scatter is wanted; then every class seen must be used.
        rows_at : Path, optional
            A folder for the class means, which then are not held in memory.

        Raises
        ------
        DataError
            When shapes do not fit, or a value is not finite.
        """
        arrays = self._arrays(MOMENTS)
        p = arrays["class"].shape[0]
        d = arrays["mean"].shape[-1]
        for name, shape in {"mean": (p, d), "trace": (p,), "scatter": (d, d)}.items():
            if name in arrays and arrays[name].shape != shape:
                raise self._bad(
                    MOMENTS, f"array '{name}' of shape {arrays[name].shape}", str(shape)
                )
        # Shapes are refused before anything large is read.
        counts = self.counts()
        ids = np.flatnonzero(counts)
        places = np.arange(len(ids)) if index is None else index[ids]
        used = places >= 0
        # Outer products of single classes are not in the pooled sum.
        if scatter and not used.all():
            raise self._bad(MOMENTS, "the scatter of some classes", "that of all classes seen")
        return MomentsRead(
            Moments(
                counts[ids][used],
                self._means(arrays["mean"], used, rows_at),
                self._finite("trace", _read(arrays["trace"]))[used],
                self._finite("scatter", _read(arrays["scatter"])) if scatter else None,
                places[used].astype(np.int64),
                int(self._attributes(MOMENTS).get("skipped", 0)),
            )
        )

    def _means(
        self, array: zarr.Array[Any], used: npt.NDArray[np.bool_], rows_at: Path | None
    ) -> npt.NDArray[np.float64] | StoredRows:
        shape = (int(np.count_nonzero(used)), int(array.shape[1]))
        blocks = (self._finite("mean", block) for block in _row_chunks(array, used))
        if rows_at is not None:  # a name that says what is in it: a run that goes on finds it
            content = self.fingerprint(hashlib.sha256(used.tobytes()).hexdigest())
            file = StoredRows(rows_at / f"means-{content}.rows", shape)
            return file if file.complete else rows_file(Path(file.path), blocks, shape)
        means = np.empty(shape)
        fill_rows(means, blocks)
        return means

    def decisions(self, used: Index | None) -> Decisions:
        """Read the decisions; with `used` only those on samples of these classes (K,), >= 0.

        Raises
        ------
        DataError
            When there is not a number per class.
        """
        arrays = self._arrays(DECISIONS)
        counts = {name: _read(arrays[name]) for name in DECISION_ARRAYS}
        for name, values in counts.items():
            if values.shape != (self.store.n_classes,) or (len(values) and values.min() < 0):
                raise self._bad(
                    DECISIONS,
                    f"array '{name}' of shape {values.shape}",
                    f"({self.store.n_classes},), no number below 0",
                )
        if used is not None:
            counts = {name: np.where(used >= 0, values, 0) for name, values in counts.items()}
        return Decisions(**counts, skipped=int(self._attributes(DECISIONS).get("skipped", 0)))

    def _finite(self, name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not np.isfinite(values).all():
            raise self._bad(MOMENTS, f"array '{name}' is not finite", "finite values")
        return values

    def _bad(self, kind: str, problem: str, expected: str) -> DataError:
        return DataError(
            f"{kind} of split '{self.name}', layer '{self.layer}' of {self.where}: {problem}",
            expected,
            "make that state anew; docs/store.md says what it holds",
        )


Source: TypeAlias = Samples | Finished


def _digest(fingerprint: str, classes: str) -> str:
    return hashlib.sha256(f"{fingerprint} {classes}".encode()).hexdigest()[:32]


def _read(array: zarr.Array[Any]) -> npt.NDArray[Any]:
    return read_rows(array, 0, int(array.shape[0]))


def _row_chunks(
    array: zarr.Array[Any], used: npt.NDArray[np.bool_]
) -> Iterator[npt.NDArray[np.float64]]:
    """Read the rows used chunk by chunk, so that no more than one is held beside the result."""
    n = int(array.shape[0])
    rows = int(array.chunks[0])
    for start in range(0, n, rows):
        kept = used[start : min(start + rows, n)]
        block = read_rows(array, start, start + len(kept)).astype(np.float64, copy=False)
        yield block if kept.all() else block[kept]
        del block
