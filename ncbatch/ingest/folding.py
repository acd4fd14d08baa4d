"""LayerFold: the samples of one layer of a dump, folded into moments and decisions as they come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.arrays import Array, namespace, to_numpy
from ncbatch.errors import DataError
from ncbatch.ingest.deciding import Decider, beside
from ncbatch.stats import Decisions, Moments, MomentsAccumulator, SeenMoments

Arrays = dict[str, npt.NDArray[Any]]

# Names of arrays of states in a store; docs/store.md has their shapes.
_MOMENTS = {"count": "counts", "mean": "means", "trace": "traces", "scatter": "scatter"}
DECISIONS = tuple(each.name for each in fields(Decisions))
_RUNNING = ("pilots", "sums", "traces")


@dataclass
class LayerFold:
    """What the samples of one layer are folded into.

    Attributes
    ----------
    n_classes : int
        K.
    moments : MomentsAccumulator or None
        Their moments, if those are wanted.
    decisions : Decisions or None
        How they were decided, if that is wanted; on the host.
    decider : Decider or None
        Who decides; None where no more samples come.
    position : int
        Samples folded.
    about : dict
        What decides, by names that the store's states have.
    """

    n_classes: int
    moments: MomentsAccumulator | None
    decisions: Decisions | None = None
    decider: Decider | None = None
    position: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> list[str]:
        """Kinds of the states that come of it."""
        kinds = (("moments", self.moments), ("decisions", self.decisions))
        return [kind for kind, state in kinds if state is not None]

    @property
    def awaits_head(self) -> bool:
        """Whether a block is folded only when the model's own decisions are there."""
        return self.decider is not None and self.decider.classifier is None

    @property
    def running_bytes(self) -> int:
        """Bytes of what `running` gives."""
        if self.moments is None:
            return 0
        arrays = self.moments.arrays()
        counts, pilots = arrays["counts"], arrays["pilots"]
        n_seen = int(namespace(counts).count_nonzero(counts))
        return MomentsAccumulator.state_bytes(
            n_seen, int(pilots.shape[1]), itemsize=int(pilots.dtype.itemsize)
        )

    def add(self, features: Array, labels: Array, decided: Array | None) -> None:
        """Fold a block: `features` (B, D), `labels` (B,) in 0..K-1, the model's decisions (B,)."""
        if self.moments is not None:
            self.moments.add(features, labels)
        if self.decisions is not None:
            assert self.decider is not None
            classifier = decided if self.decider.classifier is None else self.decider.classifier
            block = Decisions.from_block(
                features, labels, self.n_classes, self.decider.nearest, classifier
            )
            found = Decisions(*(to_numpy(values) for values in vars(block).values()))
            self.decisions = self.decisions.merge(found)
        self.position += int(labels.shape[0])

    def running(self) -> Arrays:
        """Give all that it is so far, on the host and over the classes seen: see `restore`."""
        found = {} if self.decisions is None else dict(vars(self.decisions))
        if self.moments is None:
            return found
        arrays = self.moments.arrays()
        counts = to_numpy(arrays["counts"])
        classes = np.flatnonzero(counts)
        found |= {"class": classes, "count": counts[classes]}
        for name in _RUNNING:
            rows = arrays[name]
            if len(classes) < self.n_classes:
                xp = namespace(rows)
                rows = xp.take(rows, beside(rows, classes), axis=0)
            found[name] = to_numpy(rows)
        return found | {"scatter": to_numpy(arrays["scatter"])}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]], position: int) -> None:
        """Go on to the same bits from what `running` gave when `position` samples were folded.

        Raises
        ------
        DataError
            When it was given by a fold of another layer, other classes or other kinds.
        """
        self.position = position
        if self.decisions is not None:
            self.decisions = Decisions(*(arrays[name] for name in DECISIONS))
        if self.moments is None:
            return
        own = self.moments.arrays()
        classes = arrays["class"]
        whole = {"scatter": beside(own["scatter"], arrays["scatter"])}
        for name, stored in {
            "counts": "count",
            **dict(zip(_RUNNING, _RUNNING, strict=True)),
        }.items():
            rows = arrays[stored]
            if rows.shape[1:] != tuple(own[name].shape[1:]):
                raise DataError(
                    f"a running state of rows {rows.shape[1:]}", f"{own[name].shape[1:]}"
                )
            if len(classes) < self.n_classes:
                # Memory of the classes that have no samples is not touched.
                spread = np.zeros((self.n_classes, *rows.shape[1:]), rows.dtype)
                spread[classes] = rows
                rows = spread
            whole[name] = beside(own[name], rows)
        self.moments.restore(whole)

    def finish(self) -> dict[str, Arrays]:
        """Give the arrays of the finished states by kind; the fold is spent."""
        found: dict[str, Arrays] = {}
        if self.moments is not None:
            classes, moments = self.moments.finish_seen()
            found["moments"] = moments_arrays(SeenMoments(classes, moments))
            self.moments = None
        if self.decisions is not None:
            found["decisions"] = dict(vars(self.decisions))
        return found


def moments_arrays(seen: SeenMoments) -> Arrays:
    """Give moments as the arrays of a state in a store."""
    found = {"class": to_numpy(seen.classes)}
    for name, attribute in _MOMENTS.items():
        value = getattr(seen.moments, attribute)
        if value is not None:
            found[name] = to_numpy(value)
    return found


def moments_of(arrays: Mapping[str, npt.NDArray[Any]]) -> SeenMoments:
    """Give moments from the arrays of a state in a store; the inverse of `moments_arrays`."""
    values = {attribute: arrays.get(name) for name, attribute in _MOMENTS.items()}
    return SeenMoments(arrays["class"], Moments(**values))
