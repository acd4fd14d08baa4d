"""Summed splits: layers of which a store holds finished states in the place of the samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays import StoredRows
from ncbatch.errors import DataError
from ncbatch.ingest.merging import unmerged_layers
from ncbatch.reads import DecisionsRead, MomentsRead, rows_file
from ncbatch.stats import Decisions, Moments, SeenMoments
from ncbatch.store import FeatureStore, LayerSpec
from ncbatch.store.chunks import read_rows
from ncbatch.store.names import natural_key
from ncbatch.store.states import check_arrays

MOMENTS, DECISIONS = "moments", "decisions"
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SummedSplit:
    """The layers of a split that are there as states; stands where a `Split` stands.

    Attributes
    ----------
    store : FeatureStore
        The store.
    name : str
        The split's name.
    """

    store: FeatureStore
    name: str
    head: ClassVar[str | None] = None  # no predictions of single samples
    _opened: dict[tuple[str, str], dict[str, zarr.Array[Any]] | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return SummedSplit, (self.store, self.name)

    @property
    def where(self) -> str:
        """The store's path, for messages."""
        return self.store.path

    @property
    def layers(self) -> list[str]:
        """Layers with moments, in the order of the model's depth where it is known, else of names."""
        notes = self.store.layer_notes
        return sorted(
            self.store.state_layers(self.name, MOMENTS),
            key=lambda layer: (notes.get(layer, {}).get("depth", 2.0), natural_key(layer)),
        )

    @property
    def unmerged(self) -> list[str]:
        """Layers of which there are only parts, of processes that have not all ended or merged."""
        return unmerged_layers(self.store, self.name)

    def has(self, layer: str, kind: str = MOMENTS) -> bool:
        """Whether a layer has a state of that kind."""
        return self._found(layer, kind) is not None

    def _found(self, layer: str, kind: str) -> dict[str, zarr.Array[Any]] | None:
        """Open the arrays of a state once; their metadata may be far away."""
        if (layer, kind) not in self._opened:
            self._opened[layer, kind] = self.store.state_arrays(self.name, layer, kind)
        return self._opened[layer, kind]

    def _arrays(self, layer: str, kind: str) -> dict[str, zarr.Array[Any]]:
        arrays = self._found(layer, kind) or {}
        names = _MOMENTS if kind == MOMENTS else _DECISIONS
        for name in names:
            if name not in arrays:
                raise self._bad(layer, kind, f"no array '{name}'", ", ".join(names))
        return arrays

    def spec(self, layer: str) -> LayerSpec:
        """Width D; the means are float64, whatever the features were."""
        return LayerSpec(int(self._arrays(layer, MOMENTS)["mean"].shape[1]), "float64")

    def n_seen(self, layer: str) -> int:
        """P, the classes with samples."""
        return int(self._arrays(layer, MOMENTS)["class"].shape[0])

    def has_scatter(self, layer: str) -> bool:
        """Whether the moments hold the pooled scatter."""
        return "scatter" in self._arrays(layer, MOMENTS)

    def chunk_bytes(self, layer: str) -> int:
        """Bytes of a chunk of the means, which are read chunk by chunk."""
        mean = self._arrays(layer, MOMENTS)["mean"]
        return int(np.prod(mean.chunks)) * 8

    def attributes(self, layer: str, kind: str = MOMENTS) -> dict[str, Any]:
        """Give what was recorded beside a state."""
        return self.store.state_attributes(self.name, layer, kind)

    def fingerprint(self, layer: str, class_filter: str = "", *, kind: str = MOMENTS) -> str:
        """Hash the stored checksums of a state, and the classes used."""
        own = self.store.state_fingerprint(self.name, layer, kind)
        return hashlib.sha256(f"{own} {class_filter}".encode()).hexdigest()[:32]

    def check_chunks(self, layer: str) -> None:
        """Refuse states of which a chunk is missing.

        Raises
        ------
        CorruptionError
            Names the first such chunk.
        """
        for kind in (MOMENTS, DECISIONS):
            check_arrays((self._found(layer, kind) or {}).values())

    def counts(self, layer: str) -> Index:
        """Read the samples of each class (K,).

        Raises
        ------
        DataError
            When the classes are not ascending ids below K with a sample each.
        """
        arrays = self._arrays(layer, MOMENTS)
        classes, found = _whole(arrays["class"]), _whole(arrays["count"])
        k = self.store.n_classes
        if classes.shape != found.shape or classes.ndim != 1:
            raise self._bad(
                layer, MOMENTS, f"{found.shape} counts of {classes.shape} classes", "one per class"
            )
        within = not len(classes) or (classes[0] >= 0 and classes[-1] < k)
        if not within or np.any(np.diff(classes) <= 0) or np.any(found < 1):
            raise self._bad(
                layer, MOMENTS, "classes and counts that do not fit",
                f"ascending classes in 0..{k - 1}, each with samples",
            )  # fmt: skip
        counts = np.zeros(k, np.int64)
        counts[classes] = found
        return counts

    def moments(
        self, layer: str, index: Index | None, *, scatter: bool, rows_at: Path | None = None
    ) -> MomentsRead:
        """Read the moments of the classes used, as a read of the samples would give them.

        Parameters
        ----------
        layer : str
            Which layer.
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
        arrays = self._arrays(layer, MOMENTS)
        self._check_shapes(layer, arrays)
        counts = self.counts(layer)
        ids = np.flatnonzero(counts)
        places = np.arange(len(ids)) if index is None else index[ids]
        used = places >= 0
        if scatter and not used.all():
            raise self._bad(
                layer, MOMENTS, "the scatter of some classes", "that of all classes seen"
            )
        traces = self._finite(layer, "trace", _whole(arrays["trace"]))[used]
        pooled = self._finite(layer, "scatter", _whole(arrays["scatter"])) if scatter else None
        means: Any = self._means(layer, arrays["mean"], used, rows_at)
        state = Moments(counts[ids][used], means, traces, pooled)
        skipped = int(self.attributes(layer).get("skipped", 0))
        return MomentsRead(SeenMoments(places[used].astype(np.int64), state), None, skipped)

    def _means(
        self, layer: str, array: zarr.Array[Any], used: npt.NDArray[np.bool_], rows_at: Path | None
    ) -> npt.NDArray[np.float64] | StoredRows:
        shape = (int(np.count_nonzero(used)), int(array.shape[1]))
        blocks = (self._finite(layer, "mean", block) for block in _row_chunks(array, used))
        if rows_at is not None:  # a name that says what is in it: a run that goes on finds it
            content = self.fingerprint(layer, hashlib.sha256(used.tobytes()).hexdigest())
            file = StoredRows(rows_at / f"means-{content}.rows", shape)
            return file if file.complete else rows_file(Path(file.path), blocks, shape)
        means, first = np.empty(shape), 0
        for block in blocks:
            means[first : first + len(block)] = block
            first += len(block)
        return means

    def decisions(self, layer: str, used: Index | None) -> DecisionsRead:
        """Read the decisions; with `used` only those on samples of these classes (K,), >= 0.

        Raises
        ------
        DataError
            When there is not a number per class.
        """
        arrays = self._arrays(layer, DECISIONS)
        found = Decisions(*(_whole(arrays[name]) for name in _DECISIONS))
        for name, values in vars(found).items():
            if values.shape != (self.store.n_classes,) or (len(values) and values.min() < 0):
                raise self._bad(
                    layer, DECISIONS, f"array '{name}' of shape {values.shape}",
                    f"({self.store.n_classes},), no number below 0",
                )  # fmt: skip
        if used is not None:
            found = Decisions(*(np.where(used >= 0, values, 0) for values in vars(found).values()))
        return DecisionsRead(found, int(self.attributes(layer, DECISIONS).get("skipped", 0)))

    def undecided(self, train: SummedSplit | None, layer: str, classifier: str | None) -> str:
        """Say why stored decisions are not those of the class means of `train`; empty if they are.

        Parameters
        ----------
        train : SummedSplit or None
            Whose stored moments give the means; None where the means come from features.
        layer : str
            Which layer.
        classifier : str or None
            Fingerprint of the classifier that is stored now.
        """
        if not self.has(layer, DECISIONS):
            return f"no samples and no decisions of split '{self.name}'"
        about = self.attributes(layer, DECISIONS)
        own = None
        if train is not None and about.get("means_split") == train.name:
            own = self.store.state_fingerprint(train.name, layer, MOMENTS)
        if own is None or about.get("means_fingerprint") != own:
            return f"decisions of split '{self.name}' are by other class means"
        recorded = about.get("classifier_fingerprint")
        if recorded is not None and classifier is not None and recorded != classifier:
            return f"decisions of split '{self.name}' are by another classifier"
        return ""

    def _check_shapes(self, layer: str, arrays: dict[str, zarr.Array[Any]]) -> None:
        p, d = arrays["class"].shape[0], arrays["mean"].shape[-1]
        wanted = {"mean": (p, d), "trace": (p,), "scatter": (d, d)}
        for name, shape in wanted.items():
            if name in arrays and arrays[name].shape != shape:
                raise self._bad(
                    layer, MOMENTS, f"array '{name}' of shape {arrays[name].shape}", str(shape)
                )

    def _finite(self, layer: str, name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not np.isfinite(values).all():
            raise self._bad(layer, MOMENTS, f"array '{name}' is not finite", "finite values")
        return values

    def _bad(self, layer: str, kind: str, found: str, expected: str) -> DataError:
        return DataError(
            f"{kind} of split '{self.name}', layer '{layer}' of {self.where}: {found}", expected,
            "make that state anew; docs/store.md says what it holds",
        )  # fmt: skip


_MOMENTS = ("class", "count", "mean", "trace")
_DECISIONS = tuple(Decisions.__dataclass_fields__)


def _whole(array: zarr.Array[Any]) -> npt.NDArray[Any]:
    return read_rows(array, 0, int(array.shape[0]))


def _row_chunks(
    array: zarr.Array[Any], used: npt.NDArray[np.bool_]
) -> Iterator[npt.NDArray[np.float64]]:
    """Read the rows used chunk by chunk, so that no more than one is held beside the result."""
    n, rows = int(array.shape[0]), int(array.chunks[0])
    for start in range(0, n, rows):
        kept = used[start : min(start + rows, n)]
        block = read_rows(array, start, start + len(kept)).astype(np.float64, copy=False)
        yield block if kept.all() else block[kept]
        del block
