"""Ways into a store: torch models by hooks, language models with their texts, files by import."""

from ncbatch.ingest.files.imports import import_classifier, import_features, read_classes
from ncbatch.ingest.files.layers import open_rows
from ncbatch.ingest.language.dumps import dump_language_model
from ncbatch.ingest.model.dumps import dump
from ncbatch.ingest.model.ranks import finalize

__all__ = [
    "dump",
    "dump_language_model",
    "finalize",
    "import_classifier",
    "import_features",
    "open_rows",
    "read_classes",
]
