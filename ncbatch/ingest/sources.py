"""Sources of an import: which files hold features, labels and what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ncbatch.errors import UsageError
from ncbatch.ingest.formats import Shard
from ncbatch.ingest.labelling import (
    Marks,
    Order,
    beside,
    next_labels,
    open_beside,
    without_columns,
)
from ncbatch.ingest.layers import Layers, open_layers
from ncbatch.ingest.rows import RowStream, find_paths, open_shards

NEXT = "next"


@dataclass(frozen=True)
class Opened:
    """What the sources of an import hold; labels as they are, before masks.

    Attributes
    ----------
    rows : Layers
        The features.
    labels, predictions : RowStream or None
        Integers (N,).
    marks : Marks
        Masks that labels have still to be given.
    """

    rows: Layers
    labels: RowStream | None
    predictions: RowStream | None
    marks: Marks


@dataclass(frozen=True)
class Sources:
    """Where the parts of an import are, as the user wrote them; see `import_features`."""

    features: str
    labels: str | None = None
    predictions: str | None = None
    tokens: str | None = None
    documents: str | None = None
    mask: str | None = None
    loss_mask: str | None = None

    def open(self, layer: str | Sequence[str], axes: str | None, layer_index: int | None) -> Opened:
        """Open all of them, and check that they belong together.

        Raises
        ------
        DataError
            When one cannot be read, or has other rows.
        UsageError
            When options do not belong together.
        """
        self._check()
        following = self.labels == NEXT
        named = self.tokens if following else self.labels
        what = "token ids" if following else "labels"
        given: tuple[Shard, ...] = () if named is None else open_shards(self._whole(named), what)
        if following:
            given = without_columns(given)
        rows = open_layers(self.features, layer, axes, layer_index, given)
        order = Order.of(rows.shards, rows.axes, given if following else ())
        marks = Marks(
            self._beside(self.mask, "mask", order),
            self._beside(self.loss_mask, "loss mask", order),
            self._beside(self.documents, "documents", order),
        )
        chosen = self._beside(self.predictions, "predictions", order)
        if chosen is not None and len(rows.names) > 1:
            raise UsageError(
                f"predictions with {len(rows.names)} layers",
                "the one layer whose classifier made them",
                "import that layer by itself, or add it later with --predictions",
            )
        labels = None
        if given and following:
            labels = next_labels(given, order, marks)
        elif given:
            labels = beside(given, "labels", order)
        return Opened(rows, labels, chosen, Marks() if following else marks)

    def _beside(self, source: str | None, what: str, order: Order) -> RowStream | None:
        return None if source is None else open_beside(self._whole(source), what, order)

    def _whole(self, source: str) -> str:
        """Put the path of the features before ``:key``."""
        if not source.startswith(":"):
            return source
        _, key = find_paths(self.features, "features")
        return self.features.removesuffix(f":{key}") + source

    def _check(self) -> None:
        if self.labels == NEXT and self.tokens is None:
            raise UsageError("--labels next without token ids", "--tokens")
        for option, value in (("--tokens", self.tokens), ("--documents", self.documents)):
            if value is not None and self.labels != NEXT:
                raise UsageError(
                    f"{option} without --labels next", "token ids to make labels of",
                    "add --labels next, or leave it out",
                )  # fmt: skip
