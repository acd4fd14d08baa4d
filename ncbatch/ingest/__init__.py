"""Ways into a store: torch models by hooks, language models with their texts, files by import.

Names are resolved when first used (PEP 562): files need nothing of what models need.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncbatch.ingest.files.imports import import_classifier, import_features, read_classes
    from ncbatch.ingest.files.layers import open_rows
    from ncbatch.ingest.language.dumps import dump_language_model
    from ncbatch.ingest.model.dumps import dump
    from ncbatch.ingest.model.ranks import finalize

_HOMES = {
    "dump": "model.dumps",
    "dump_language_model": "language.dumps",
    "finalize": "model.ranks",
    "import_classifier": "files.imports",
    "import_features": "files.imports",
    "open_rows": "files.layers",
    "read_classes": "files.imports",
}

__all__ = [
    "dump",
    "dump_language_model",
    "finalize",
    "import_classifier",
    "import_features",
    "open_rows",
    "read_classes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ncbatch.ingest' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ncbatch.ingest.{_HOMES[name]}"), name)
