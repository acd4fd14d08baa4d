"""Ways into a store: torch models by hooks, files by import."""

from ncbatch.ingest.files import import_classifier, import_features, read_classes
from ncbatch.ingest.hooks import dump
from ncbatch.ingest.rows import open_rows

__all__ = ["dump", "import_classifier", "import_features", "open_rows", "read_classes"]
