"""The engine runs passes within a memory budget; it knows nothing of neural collapse."""

from ncbatch.engine.plan import Price, check_budget, format_bytes, memory_budget, resident_bytes
from ncbatch.engine.run import Item, Pass, Progress, run

__all__ = [
    "Item",
    "Pass",
    "Price",
    "Progress",
    "check_budget",
    "format_bytes",
    "memory_budget",
    "resident_bytes",
    "run",
]
