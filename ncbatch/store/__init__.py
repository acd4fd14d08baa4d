"""The feature store: chunked Zarr v3 arrays of features, with a commit log of labels."""

from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.format import FORMAT, LayerSpec
from ncbatch.store.split import Split
from ncbatch.store.writer import LayerWriter, Writer

__all__ = ["FORMAT", "FeatureStore", "LayerSpec", "LayerWriter", "Split", "Writer"]
