"""The shape of a layer: the numbers that the cost of measuring it depends on, from metadata."""

from __future__ import annotations

from ncbatch.layer import AnySplit, Layer
from ncbatch.pricing import Rows, Shape
from ncbatch.rows import RowSource
from ncbatch.summed import SummedSplit

# The allocator keeps a freed chunk for each thread that read one.
_CHUNKS_KEPT = 12


def shape_of(layer: Layer, *, merged: bool = False) -> Shape:
    """Give the numbers that a layer's cost depends on.

    Parameters
    ----------
    layer : Layer
        Which, and how it is measured.
    merged : bool, optional
        Whether items are merged on a cluster.
    """
    spec = layer.train.spec(layer.layer)
    reads, decided, outside = layer.reads, layer.decided, layer.ood
    weighs = layer.has_classifier and reads & {"classifier", "decisions"}
    return Shape(
        where=layer.where,
        n_classes=layer.store.n_classes,
        n_used=_n_used(layer),
        n_features=spec.n_features,
        wide=spec.dtype == "float64",
        train=_rows(layer.train, layer.layer),
        decided=_rows(decided, layer.layer) if reads & {"decisions", "test"} else None,
        outside=None if outside is None or "ood" not in reads else _rows(outside, layer.layer),
        reads=reads,
        quantities=layer.quantities,
        null_quantities=layer.null_quantities,
        null=layer.null,
        weight_bytes=_weight_bytes(layer) if weighs else 0,
        classifier_decides=not layer.by_predictions,
        decisions_stored=isinstance(decided, SummedSplit),
        faiss=layer.options.ncc == "faiss",
        on_device=layer.options.device != "cpu",
        merged=merged,
    )


def _n_used(layer: Layer) -> int:
    """How many classes are used, or can be as far as metadata says."""
    if layer.selection is not None:
        return len(layer.selection.classes)
    train = layer.train
    most = train.n_seen(layer.layer) if isinstance(train, SummedSplit) else train.n_rows
    n_used = min(layer.store.n_classes, max(most, 1))
    listed = layer.options.classes
    return n_used if listed is None else min(n_used, len(set(listed)))


def _weight_bytes(layer: Layer) -> int:
    """Bytes of an element of the classifier in memory; bfloat16 is read as float32."""
    weight = layer.store.classifier_arrays(layer.layer)[-1]
    return 4 if str(weight.dtype) == "bfloat16" else int(weight.dtype.itemsize)


def _rows(split: AnySplit, layer: str) -> Rows:
    if isinstance(split, SummedSplit):
        if not split.has(layer):  # decisions only
            return Rows(0, 0, 0, 0, 0, summed=True)
        width, chunks = split.spec(layer).n_features * 8, _CHUNKS_KEPT * split.chunk_bytes(layer)
        return Rows(split.n_seen(layer), 0, width, 0, chunks, summed=True)
    source, spec = RowSource(split, layer), split.spec(layer)
    return Rows(
        split.n_rows, len(source.items), spec.row_bytes, source.block_rows, source.read_bytes
    )
