"""The engine runs passes within a memory budget; it knows nothing of neural collapse."""

from ncbatch.arrays.named_arrays import Arrays, pack, unpack
from ncbatch.engine.jobs import Call, Item, Job, Pass, Price, Progress, Step, Sweep, cut
from ncbatch.engine.kept import About, Kept, digest
from ncbatch.engine.loop import run, run_jobs
from ncbatch.engine.plans import Plan, check_budget, format_bytes, memory_budget, resident_bytes

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
