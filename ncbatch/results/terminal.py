"""What a terminal shows of a store and of work that goes on; loads neither xarray nor metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from dask.utils import format_bytes
from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.states import PART, RUNNING


def open_console() -> Console:
    """Open the console that tables are printed to."""
    console = Console(markup=False, emoji=False)  # layer names may hold brackets and colons
    if not console.is_terminal:  # never cut a table there
        console.width = max(console.width, 1000)
    return console


def show(console: Console, parts: Sequence[RenderableType]) -> None:
    """Print tables and texts one after another."""
    for part in parts:
        console.print(part)


def info_tables(store: FeatureStore) -> list[RenderableType]:
    """Lay out what is in a store: splits, layers, sizes and classifiers."""
    head = f"{store.path}: format 1, id {store.id}, K = {store.n_classes} classes"
    columns = ["split", "layer", "samples", "features", "dtype", "bytes", "rows per chunk", ""]
    table = Table(*columns)
    for name in store.splits:
        split = store.split(name)
        samples = f"{split.n_samples:,}"
        if split.finalized and split.n_rows != split.n_samples:
            samples += f" of {split.n_rows:,} rows"
        for layer in split.layers:
            spec = split.spec(layer)
            marks = {
                "being written, or interrupted": not split.finalized,
                "classifier": layer in store.classifiers,
                "predictions": split.head == layer,
            }
            table.add_row(
                name,
                layer,
                samples,
                f"{spec.n_features:,}",
                spec.dtype,
                format_bytes(split.n_rows * spec.row_bytes),
                f"{split.feature(layer).chunks[0]:,}",
                ", ".join(mark for mark, holds in marks.items() if holds),
            )
        for layer in split.incomplete_layers:
            table.add_row(name, layer, *[""] * 5, "incomplete: write it again")
    for name in store.state_splits:
        kinds = store.state_kinds(name)
        for layer, kind in kinds:
            if not kind.startswith((RUNNING, PART)):
                table.add_row(name, layer, *_state_row(store, name, layer, kind))
        for layer in dict.fromkeys(layer for layer, _ in kinds):
            for text in _unmerged(kinds, layer):
                table.add_row(name, layer, *[""] * 5, text)
    recorded = [f"model {store.model}"] if store.model is not None else []
    if store.step is not None:
        recorded.append(f"step {store.step:,}")
    lines = [head, ", ".join(recorded)] if recorded else [head]
    return [*map(Text, lines), table]


def _state_row(store: FeatureStore, split: str, layer: str, kind: str) -> Iterator[str]:
    """Yield the cells of a state; of its arrays only the counts are read."""
    arrays = store.state_arrays(split, layer, kind) or {}
    counts = next((arrays[name] for name in ("count", "samples") if name in arrays), None)
    mean = arrays.get("mean")
    has_samples = split in store.splits and layer in store.split(split).layers
    yield "" if counts is None else f"{int(np.asarray(counts[:]).sum()):,}"
    yield "" if mean is None else f"{mean.shape[1]:,}"
    yield "" if mean is None else str(mean.dtype)
    yield format_bytes(sum(int(array.nbytes) for array in arrays.values()))
    yield ""
    yield kind if has_samples else f"{kind}, without the samples"


def _unmerged(kinds: Sequence[tuple[str, str]], layer: str) -> Iterator[str]:
    """Say what processes that folded a layer have left, and what is to be done with it."""
    for prefix, task in (
        (PART, "to be merged: 'ncbatch finalize'"),
        (RUNNING, "being folded, or interrupted: 'ncbatch dump --resume'"),
    ):
        names = [kind.removeprefix(prefix) for of, kind in kinds if of == layer and prefix in kind]
        ranks = sorted(int(rank) for rank in names if rank.isdecimal())
        if ranks:
            who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            yield f"{prefix.removesuffix('-')} of {who}, {task}"


class _Rate(ProgressColumn):
    """Shows how much is done, of how much, and how fast."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        speed = task.finished_speed or task.speed
        return Text(
            f"{_amount(task.completed, unit)} of {_amount(task.total or 0, unit)}"
            + (f", {_amount(speed, unit)}/s" if speed else "")
        )


def _amount(value: float, unit: str) -> str:
    return format_bytes(int(value)) if unit == "B" else f"{value:,.0f} {unit}"


class ProgressBar:
    """Shows a run's progress on a terminal, with rate and time left; silent elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: RichProgress | None = None

    def begin(self, label: str, total: int, unit: str) -> None:
        """Start a bar for a pass."""
        columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), _Rate()]
        self._bar = RichProgress(
            *columns,
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar.add_task(label, total=total, unit=unit)
        self._bar.start()

    def advance(self, size: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], size)

    def note(self, text: str) -> None:
        """Say something beside the bar."""
        self._console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
