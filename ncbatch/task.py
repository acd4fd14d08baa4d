"""LayerTask: the steps of measuring one layer of one store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.arrays import StoredRows
from ncbatch.engine import About, Call, Item, Job, Step, Sweep, cut
from ncbatch.layer import AnySplit, Layer, device_put
from ncbatch.passes import (
    DecisionsPass,
    DirectionalPass,
    MomentsPass,
    PairPass,
)
from ncbatch.pricing import Mode, Shape
from ncbatch.reads import joined
from ncbatch.rows import RowSource, count_labels, select_classes
from ncbatch.shaping import shape_of
from ncbatch.stats import PairTiles, faiss_nearest_rule, linear_rule, nearest_mean_rule
from ncbatch.store import Split
from ncbatch.summed import SummedSplit
from ncbatch.values import Measured, cell_of, measured_of

# Steps whose results the values are computed from.
_RESULTS = ("measured", "pairs", "null_pairs", "decisions", "outside", "test", "directional")
# Tiles of an item of the pair sweep at most, for resume and balance.
_ITEM_TILES, _ITEMS = 256, 16


@dataclass(frozen=True)
class _Read:
    """A read that gives moments: of what, over how many classes, and its pass by class block."""

    label: str
    source: RowSource
    n_classes: int
    about: About
    work: Callable[..., MomentsPass]


@dataclass(frozen=True)
class LayerTask(Layer):
    """A layer with its steps."""

    def shape(self, *, merged: bool = False) -> Shape:
        """Give the numbers that its cost depends on; reads nothing but metadata."""
        return shape_of(self, merged=merged)

    # ------------------------------------------------------------------------------- its steps

    def job(self, mode: Mode, folder_of: Callable[[About], Path]) -> Job:
        """Give its steps.

        Parameters
        ----------
        mode : Mode
            How it is measured.
        folder_of : callable
            Gives the folder for class means that do not stay in memory, of a state.
        """
        reads = self.reads
        steps = list(self._moments_steps("moments", self.train, mode, folder_of))
        steps.append(Call("measured", partial(measured_of, self), ("moments",)))
        steps += self._pair_steps(mode)
        steps += self._read_steps()
        if "ood" in reads and self.ood is not None:
            steps += self._moments_steps("outside", self.ood, mode, folder_of)
        if "test" in reads:
            steps += self._moments_steps("test", self.decided, mode, folder_of)
        names = tuple(s.name for s in steps if s.name in _RESULTS)
        steps.append(Call("cell", partial(cell_of, self, names), names))
        return Job(self.where, tuple(steps))

    def _moments_steps(
        self, name: str, split: AnySplit, mode: Mode, folder_of: Callable[[About], Path]
    ) -> Iterator[Step]:
        """Give the steps of moments: the state that the store holds, or reads of samples."""
        if isinstance(split, SummedSplit):
            read = partial(
                split.moments, self.layer, None if name == "outside" else self.selected.index,
                scatter=name == "moments" and "scatter" in self.reads,
                rows_at=folder_of(self.about("means", split)) if mode.stored else None,
            )  # fmt: skip
            yield Call(name, read)
            return
        reads = {
            "moments": self._train_moments, "outside": self._outside_moments,
            "test": self._test_moments,
        }  # fmt: skip
        yield from self._blocks(name, reads[name](split), mode, folder_of)

    def _blocks(
        self, name: str, read: _Read, mode: Mode, folder_of: Callable[[About], Path]
    ) -> Iterator[Step]:
        """Give the steps of moments: one read, or one per class block, joined one after another."""
        source, label, about = read.source, read.label, read.about
        if not mode.stored:
            yield _sweep(name, label, read.work, source, about)
            return
        k, n = read.n_classes, mode.class_blocks
        blocks = list(cut(0, k, 1, most=-(-k // n), parts=n))
        so_far = ""
        for i, block in enumerate(blocks):
            own = f"{name}-{i}" if len(blocks) > 1 else name
            about_block = {**about, "class_block": list(block)}
            part = f", classes {block[0]}..{block[1] - 1}" if len(blocks) > 1 else ""
            make = partial(read.work, block=block, rows_at=folder_of(about_block))
            yield _sweep(own, label + part, make, source, about_block)
            if so_far:
                last = i == len(blocks) - 1
                own, earlier = name if last else f"{name}-to-{i}", (so_far, own)
                yield Call(own, joined, earlier)
            so_far = own

    def _train_moments(self, split: Split) -> _Read:
        holds = ["scatter"] if "scatter" in self.reads else []
        if self.null:
            holds.append(f"null {self.options.null_seed}")
        source = self._source(split, self.selected.index)
        return _Read(
            f"moments of {split.name}/{self.layer}", source, len(self.selected.classes),
            self.about("moments", split, holds=holds), partial(self._moments_pass, source),
        )  # fmt: skip

    def _outside_moments(self, split: Split) -> _Read:
        seen = select_classes(count_labels(split))
        source = self._source(split, seen.index)
        return _Read(
            f"moments of {split.name}/{self.layer}", source, len(seen.classes),
            self.about("moments", split), partial(self._plain_moments, source, len(seen.classes)),
        )  # fmt: skip

    def _test_moments(self, split: Split) -> _Read:
        source, k = self._source(split, self.selected.index), len(self.selected.classes)
        return _Read(
            f"moments of {split.name}/{self.layer} by train's classes", source, k,
            self.about("test", split, train_fingerprint=self.fingerprint),
            partial(self._plain_moments, source, k),
        )  # fmt: skip

    def _pair_steps(self, mode: Mode) -> Iterator[Step]:
        for name, quantities in (
            ("pairs", self.quantities),
            ("null_pairs", self.null_quantities),
        ):
            if not quantities:
                continue
            null = name == "null_pairs"
            about = self.about(
                name, self.train, holds=sorted(quantities), weighted=self.options.weighted,
                dist_exp=self.options.dist_exp, ddof=self.options.ddof, stored=mode.stored,
                null_seed=self.options.null_seed if null else None,
            )  # fmt: skip
            k = len(self.selected.classes)
            yield Sweep(
                name, f"{name.replace('_', ' ')} of {self.where}",
                partial(self._pair_pass, quantities, null), _tile_items(k, stored=mode.stored),
                needs=("measured",), unit="pairs", about=about,
            )  # fmt: skip

    def _read_steps(self) -> Iterator[Step]:
        reads = self.reads
        if "decisions" in reads and isinstance(self.decided, SummedSplit):
            yield Call(
                "decisions", partial(self.decided.decisions, self.layer, self._decided_index)
            )
        elif "decisions" in reads and isinstance(self.decided, Split):
            source = self._source(self.decided, self._decided_index)
            about = self.about(
                "decisions", self.decided, train_fingerprint=self.fingerprint,
                classifier_fingerprint=self.deciding, filtered=self.selected.filtered,
            )  # fmt: skip
            yield _sweep(
                "decisions", f"decisions of {self.decided.name}/{self.layer}",
                partial(self._decisions_pass, source), source, about, ("measured",),
            )  # fmt: skip
        if "directional" in reads and isinstance(self.train, Split):
            yield _sweep(
                "directional", f"directional variance of {self.train.name}/{self.layer}",
                partial(self._directional_pass, self.train), self._source(self.train, None),
                self.about("directional", self.train, weighted=self.options.weighted),
                ("measured",),
            )  # fmt: skip

    def _source(self, split: Split, index: npt.NDArray[np.int64] | None) -> RowSource:
        on_host = self.options.device == "cpu"
        return RowSource(split, self.layer, index, self.options.skip_nonfinite, on_host)

    # ------------------------------------------------------------------------------- its passes

    def _moments_pass(
        self,
        source: RowSource,
        block: tuple[int, int] | None = None,
        rows_at: Path | None = None,
    ) -> MomentsPass:
        selected = self.selected
        return MomentsPass(
            source,
            len(selected.classes),
            scatter="scatter" in self.reads,
            precision=self.options.precision,
            device=self.options.device,
            null_counts=selected.counts[selected.classes] if self.null else None,
            null_seed=self.options.null_seed,
            block=block,
            rows_at=rows_at,
        )

    def _plain_moments(
        self,
        source: RowSource,
        n_classes: int,
        block: tuple[int, int] | None = None,
        rows_at: Path | None = None,
    ) -> MomentsPass:
        return MomentsPass(
            source, n_classes, False, self.options.precision, self.options.device,
            block=block, rows_at=rows_at,
        )  # fmt: skip

    def _pair_pass(self, quantities: frozenset[str], null: bool, measured: Measured) -> PairPass:
        statistics = measured.null if null else measured.statistics
        if statistics is None:
            return PairPass(None)
        moments = statistics.moments
        return PairPass(
            PairTiles(
                moments.means,
                statistics.global_mean,
                statistics.variances,
                counts=moments.counts,
                within=moments.within_covariance if "cdnv_directional" in quantities else None,
                quantities=quantities,
                dist_exp=self.options.dist_exp,
                ddof=self.options.ddof,
            )
        )

    @property
    def _decided_index(self) -> npt.NDArray[np.int64] | None:
        """Which samples are decided: all, or with a filter those of the classes used."""
        if not self.selected.filtered:
            return None
        return np.where(self.selected.index >= 0, np.arange(self.store.n_classes), -1)

    def _decisions_pass(self, source: RowSource, measured: Measured) -> DecisionsPass:
        statistics = measured.statistics
        means = statistics.moments.means
        put = device_put(self.options.device, means)
        wide = self.train.spec(self.layer).dtype == "float64"
        dtype = np.float64 if wide else np.float32
        classifier = None
        if not self.by_predictions:
            weight, bias = self.classifier(stored=isinstance(means, StoredRows))
            classifier = linear_rule(
                put(weight),
                None if bias is None else put(bias),
                statistics.global_mean,
                dtype=dtype,
            )
        nearest = (
            faiss_nearest_rule(means, put(measured.classes), device=self.options.device)
            if self.options.ncc == "faiss"
            else nearest_mean_rule(means, put(measured.classes), dtype=dtype)
        )
        return DecisionsPass(source, nearest, classifier, self.options.device)

    def _directional_pass(self, split: Split, measured: Measured) -> DirectionalPass:
        index = np.full(self.store.n_classes, -1, np.int64)
        index[measured.classes] = np.arange(len(measured.classes))
        means = measured.statistics.moments.means
        pairs = PairTiles(means, measured.statistics.global_mean, quantities=[])
        return DirectionalPass(self._source(split, index), pairs, self.options.device)


def _sweep(
    name: str,
    label: str,
    make: Callable[..., Any],
    source: RowSource,
    about: About,
    needs: tuple[str, ...] = (),
) -> Sweep:
    """Make the step of a pass over rows."""
    return Sweep(name, label, make, source.items, source.chunk_rows, needs, about=about)


def _tile_items(n_classes: int, *, stored: bool) -> list[Item]:
    """Cut the tiles of a pair sweep over `n_classes` classes into items."""
    tiles = PairTiles.tile_list(n_classes, stored=stored)
    sizes = [(r.stop - r.start) * (c.stop - c.start) for r, c in tiles]
    ranges = cut(0, len(sizes), 1, _ITEM_TILES, _ITEMS)
    return [Item(start, stop, sum(sizes[start:stop])) for start, stop in ranges]
