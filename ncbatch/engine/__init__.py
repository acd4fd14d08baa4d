"""The engine runs passes within a memory budget; it knows nothing of neural collapse."""

from ncbatch.engine.checkpoint import About, Kept, digest
from ncbatch.engine.packing import Arrays, pack, unpack
from ncbatch.engine.plan import (
    Plan,
    Price,
    check_budget,
    cut,
    format_bytes,
    memory_budget,
    resident_bytes,
)
from ncbatch.engine.run import Call, Item, Job, Pass, Progress, Step, Sweep, run, run_jobs

__all__ = [
    "About",
    "Arrays",
    "Call",
    "Item",
    "Job",
    "Kept",
    "Pass",
    "Plan",
    "Price",
    "Progress",
    "Step",
    "Sweep",
    "check_budget",
    "cut",
    "digest",
    "format_bytes",
    "memory_budget",
    "pack",
    "resident_bytes",
    "run",
    "run_jobs",
    "unpack",
]
