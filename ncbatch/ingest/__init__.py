"""Ways into a store: torch models by hooks, language models with their texts, files by import."""

from ncbatch.ingest.files import import_classifier, import_features, read_classes
from ncbatch.ingest.hooks import dump
from ncbatch.ingest.language.dumping import dump_language_model
from ncbatch.ingest.merging import finalize
from ncbatch.ingest.rows import open_rows

__all__ = [
    "dump",
    "dump_language_model",
    "finalize",
    "import_classifier",
    "import_features",
    "open_rows",
    "read_classes",
]
