"""Updating: what of results that were saved still holds, and their union with new ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import xarray as xr

from ncbatch.errors import OutputError, UsageError
from ncbatch.measurement.layers import Layer, store_names
from ncbatch.results.dataset import CLASSES, KIND, Cell, Place, StoreNotes, cells_of, notes_in
from ncbatch.results.files import load_results
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.place import absolute
from ncbatch.version import __version__

# Attributes that say where and when, not how: results that differ in them belong together.
_CIRCUMSTANCES = {"kind", "ncbatch_version", "date", "device", "notes", "ncc", "null_seed"}


@dataclass(frozen=True)
class Saved:
    """Results of an earlier run.

    Attributes
    ----------
    where : str
        Their path, for messages.
    results : xarray.Dataset
        The results themselves; their attributes say how they were measured.
    cells : dict of (store, layer) to Cell
        What was measured.
    notes : dict of str to StoreNotes
        What was known of each store.
    """

    where: str
    results: xr.Dataset
    cells: dict[Place, Cell]
    notes: dict[str, StoreNotes]

    @classmethod
    def of(cls, results: xr.Dataset | str | os.PathLike[str]) -> Saved:
        """Take results apart.

        Raises
        ------
        OutputError
            When there are none.
        """
        where = "the results given"
        if not isinstance(results, xr.Dataset):
            where = f"'{os.fspath(results)}'"
            results = load_results(results)
        needed = {"store_id", "store_path", "fingerprint"}
        if results.attrs.get("kind") != KIND or not needed <= results.attrs.keys():
            raise OutputError(
                f"{where} cannot be updated: no results of ncbatch are in it", "earlier results"
            )
        return cls(where, results, cells_of(results), notes_in(results))

    def check(self, conventions: Mapping[str, str | int | float]) -> None:
        """Refuse to add what is measured by other conventions.

        Raises
        ------
        UsageError
            Names the first difference.
        """
        # What has a value per store, or per layer too, is JSON and belongs to stores and cells.
        saved = {
            name: value
            for name, value in self.results.attrs.items()
            if not (isinstance(value, str) and value.startswith("{"))
        }
        names = [name for name in {**conventions, **saved} if name not in _CIRCUMSTANCES]
        # Results without a null have no seed to differ in.
        if "no null" not in (saved.get("null_seed"), conventions.get("null_seed")):
            names.append("null_seed")
        for name in names:
            if saved.get(name) != conventions.get(name):
                was, now = (side.get(name, "not set") for side in (saved, conventions))
                raise UsageError(
                    f"{self.where} cannot be updated: {name} was {was} there and is {now} now",
                    "results measured alike",
                    "measure with the options of then, or save to another file",
                )

    def renamed(self, opened: Mapping[str, FeatureStore]) -> tuple[Saved, dict[str, FeatureStore]]:
        """Name all stores of both sides by the shortest names that tell them apart.

        A store is found again by its path, or by its identifier where it was moved, and has one
        name then.
        """
        same = {name: self._find(store) for name, store in opened.items()}
        others = [name for name in self.notes if name not in same.values()]
        paths = [self.notes[name].path for name in others]
        names = store_names([*paths, *(store.path for store in opened.values())])
        of_opened = dict(zip(opened, names[len(others) :], strict=True))
        of_saved = dict(zip(others, names, strict=False))
        of_saved |= {old: of_opened[name] for name, old in same.items() if old is not None}
        saved = replace(
            self,
            cells={(of_saved[store], layer): cell for (store, layer), cell in self.cells.items()},
            notes={of_saved[store]: note for store, note in self.notes.items()},
        )
        return saved, {of_opened[name]: store for name, store in opened.items()}

    def _find(self, store: FeatureStore) -> str | None:
        path = absolute(store.path)
        same = [name for name, note in self.notes.items() if absolute(note.path) == path]
        moved = [name for name, note in self.notes.items() if note.id == store.id]
        # Of two copies nobody can say which one was measured.
        if not same and len(moved) == 1 and not os.path.exists(self.notes[moved[0]].path):
            return moved[0]
        return next(iter(same), None)

    def serves(self, task: Layer) -> bool:
        """Whether a layer's saved results are what measuring it again would give."""
        cell = self._valid(task)
        if cell is None or not set(task.metric_names) <= cell.values.keys() | cell.reasons.keys():
            return False
        nulls = [f"{metric.name}_null" for metric in task.metrics if metric.has_null and task.null]
        if nulls and cell.values.keys().isdisjoint(nulls):
            return False
        return not task.options.per_class or not cell.vectors.keys().isdisjoint(CLASSES)

    def _valid(self, task: Layer) -> Cell | None:
        """Return a layer's saved results if they are of this version and of the same data."""
        cell = self.cells.get((task.name, task.layer))
        if cell is None or cell.texts.get("cell_version") != __version__:
            return None
        recorded = [name for name in cell.texts if name.endswith("fingerprint")]
        names = dict.fromkeys([*task.inputs, *recorded])
        return cell if all(cell.texts.get(name) == task.input(name) for name in names) else None

    def union(
        self, tasks: Sequence[Layer], measured: Mapping[Place, Cell]
    ) -> tuple[dict[Place, Cell], list[str]]:
        """Put what was measured now beside what was saved.

        Returns
        -------
        tuple of dict and list of str
            The cells, and the names of their stores in order: those that were saved only, then
            those of this run.
        """
        cells = dict(self.cells)
        for task in tasks:
            place = (task.name, task.layer)
            if place in measured:
                earlier = self._valid(task) or Cell()
                cells[place] = earlier.merged(measured[place])
        now = dict.fromkeys(task.name for task in tasks)
        return cells, [*(name for name in self.notes if name not in now), *now]
