"""Formats of other tools: one module per family, and the table of endings."""

from ncbatch.ingest.files.formats.shard import Block, Blocks, Index, Shard, readable
from ncbatch.ingest.files.formats.table import FORMATS, array_names, find_format, open_shard

__all__ = [
    "FORMATS",
    "Block",
    "Blocks",
    "Index",
    "Shard",
    "array_names",
    "find_format",
    "open_shard",
    "readable",
]
