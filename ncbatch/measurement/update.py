"""Updating: results that were saved, what of them still holds, and their union with new ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import xarray as xr

from ncbatch.errors import OutputError, UsageError
from ncbatch.measurement.layers import Layer, store_names
from ncbatch.results.dataset import KIND, Cell, StoreNotes, cells_of, merged, metric_names, notes_in
from ncbatch.results.files import load_results
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.place import absolute
from ncbatch.version import __version__

At: TypeAlias = tuple[str, str]

# Attributes that say where and when, not how: results that differ in them belong together.
_CIRCUMSTANCES = {
    "kind", "ncbatch_version", "date", "device", "store_id", "store_path", "notes", "ncc", "null_seed",
}  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """Results of an earlier run.

    Attributes
    ----------
    where : str
        Their path, for messages.
    attributes : mapping
        How they were measured.
    cells : dict of (store, layer) to Cell
        What was measured.
    notes : dict of str to StoreNotes
        What was known of each store.
    paths, ids : dict of str to str
        Where each store was, and which it was.
    layers, metrics : list of str
        In the order saved.
    """

    where: str
    attributes: Mapping[str, Any]
    cells: dict[At, Cell]
    notes: dict[str, StoreNotes]
    paths: dict[str, str]
    ids: dict[str, str]
    layers: list[str]
    metrics: list[str]

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
            where, results = f"'{os.fspath(results)}'", load_results(results)
        names = ("store_id", "store_path", "fingerprint")
        if results.attrs.get("kind") != KIND or any(n not in results.attrs for n in names):
            raise OutputError(
                f"{where} cannot be updated: no results of ncbatch are in it", "earlier results"
            )
        return cls(
            where,
            dict(results.attrs),
            cells_of(results),
            notes_in(results),
            json.loads(results.attrs["store_path"]),
            json.loads(results.attrs["store_id"]),
            [str(layer) for layer in results["layer"].values.tolist()],
            metric_names(results),
        )

    def check(self, conventions: Mapping[str, str | int | float]) -> None:
        """Refuse to add what is measured by other conventions.

        Raises
        ------
        UsageError
            Names the first difference.
        """
        per_cell = {name for name, value in self.attributes.items() if _is_nested(value)}
        mine = {
            name: value
            for name, value in self.attributes.items()
            if name not in _CIRCUMSTANCES | per_cell
        }
        for name in [*conventions, *mine]:
            if name in _CIRCUMSTANCES or mine.get(name) == conventions.get(name):
                continue
            raise _differs(self.where, name, mine.get(name), conventions.get(name))
        seeds = (self.attributes.get("null_seed"), conventions.get("null_seed"))
        if seeds[0] != seeds[1] and "no null" not in seeds:
            raise _differs(self.where, "null_seed", *seeds)

    def renamed(self, opened: Mapping[str, FeatureStore]) -> tuple[Saved, dict[str, FeatureStore]]:
        """Give both sides the shortest names that tell all stores apart; equal stores get one name.

        A store is found again by its path, or by its identifier where it was moved.
        """
        same = {name: self._find(store) for name, store in opened.items()}
        others = [name for name in self.paths if name not in same.values()]
        paths = [*(self.paths[name] for name in others), *(s.path for s in opened.values())]
        names = store_names(paths)
        of_saved = dict(zip(others, names, strict=False))
        of_opened = dict(zip(opened, names[len(others) :], strict=True))
        of_saved |= {old: of_opened[name] for name, old in same.items() if old is not None}
        saved = Saved(
            self.where,
            self.attributes,
            {(of_saved[store], layer): cell for (store, layer), cell in self.cells.items()},
            {of_saved[store]: note for store, note in self.notes.items()},
            {of_saved[store]: path for store, path in self.paths.items()},
            {of_saved[store]: own for store, own in self.ids.items()},
            self.layers,
            self.metrics,
        )
        return saved, {of_opened[name]: store for name, store in opened.items()}

    def _find(self, store: FeatureStore) -> str | None:
        path = absolute(store.path)
        by_path = [name for name, other in self.paths.items() if absolute(other) == path]
        by_id = [name for name, other in self.ids.items() if other == store.id]
        if by_path:
            return by_path[0]
        moved = len(by_id) == 1 and not os.path.exists(self.paths[by_id[0]])
        return by_id[0] if moved else None

    def serves(self, task: Layer) -> bool:
        """Whether a layer's saved results are what measuring it again would give."""
        cell = self._valid(task)
        if cell is None or any(
            name not in cell.values and name not in cell.reasons for name in task.metric_names
        ):
            return False
        nulls = [metric.name for metric in task.metrics if metric.has_null and task.null]
        if nulls and not any(f"{name}_null" in cell.yardsticks for name in nulls):
            return False
        return bool(cell.classes) or not task.options.per_class

    def _valid(self, task: Layer) -> Cell | None:
        """Give a layer's saved results if they are of this version and of the same data."""
        cell = self.cells.get((task.name, task.layer))
        if cell is None or cell.texts.get("cell_version") != __version__:
            return None
        recorded = [name for name in cell.texts if name.endswith("fingerprint")]
        for name in dict.fromkeys([*task.inputs, *recorded]):
            if cell.texts.get(name) != task.input(name):
                return None
        return cell

    def union(
        self, tasks: Sequence[Layer], measured: Mapping[At, Cell]
    ) -> tuple[dict[At, Cell], list[str]]:
        """Put what was measured now beside what was saved.

        Returns
        -------
        tuple of dict and list of str
            The cells, and the names of their stores in order: those that were saved only, then
            those of this run.
        """
        cells = dict(self.cells)
        for task in tasks:
            at = task.name, task.layer
            if at not in measured:
                continue
            earlier = self._valid(task)
            cells[at] = measured[at] if earlier is None else merged(earlier, measured[at])
        now = dict.fromkeys(task.name for task in tasks)
        return cells, [*(name for name in self.paths if name not in now), *now]


def _is_nested(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("{")


def _differs(where: str, name: str, earlier: Any, now: Any) -> UsageError:
    said = ["not set" if value is None else f"{value}" for value in (earlier, now)]
    return UsageError(
        f"{where} cannot be updated: {name} was {said[0]} there and is {said[1]} now",
        "results measured alike",
        "measure with the options of then, or save to another file",
    )
