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
from ncbatch.layer import Layer, device_put
from ncbatch.passes import (
    DecisionsPass,
    DirectionalPass,
    MomentsPass,
    PairPass,
)
from ncbatch.pricing import Mode, Rows, Shape
from ncbatch.reads import joined
from ncbatch.rows import RowSource, count_labels, select_classes
from ncbatch.stats import PairTiles, faiss_nearest_rule, linear_rule, nearest_mean_rule
from ncbatch.store import Split
from ncbatch.values import Measured, cell_of, measured_of

# Steps whose results the values are computed from.
_RESULTS = ("measured", "pairs", "null_pairs", "decisions", "outside", "test", "directional")
# Tiles of an item of the pair sweep at most, for resume and balance.
_ITEM_TILES, _ITEMS = 256, 16
# Changed when kept states of earlier versions would no longer be right.
_STATE_VERSION = 1


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
    """A layer with its cost and its steps."""

    # ------------------------------------------------------------------------------- its cost

    def shape(self, *, merged: bool = False) -> Shape:
        """Give the numbers that its cost depends on; reads nothing but metadata."""
        spec = self.train.spec(self.layer)
        n_used = min(self.store.n_classes, max(self.train.n_rows, 1))
        if self.options.classes is not None:
            n_used = min(n_used, len(set(self.options.classes)))
        if self.selection is not None:
            n_used = len(self.selection.classes)
        weighs = self.has_classifier and self.reads & {"classifier", "decisions"}
        reads = self.reads
        return Shape(
            where=self.where,
            n_classes=self.store.n_classes,
            n_used=n_used,
            n_features=spec.n_features,
            wide=spec.dtype == "float64",
            train=self._rows(self.train),
            decided=self._rows(self.decided) if reads & {"decisions", "test"} else None,
            outside=None if self.ood is None or "ood" not in reads else self._rows(self.ood),
            reads=reads,
            quantities=self.quantities,
            null_quantities=self.null_quantities,
            null=self.options.null,
            weight_bytes=self._weight_bytes if weighs else 0,
            classifier_decides=not self.by_predictions,
            faiss=self.options.ncc == "faiss",
            on_device=self.options.device != "cpu",
            merged=merged,
        )

    @property
    def _weight_bytes(self) -> int:
        """Bytes of an element of the classifier in memory; bfloat16 is read as float32."""
        weight = self.store.classifier_arrays(self.layer)[-1]
        return 4 if str(weight.dtype) == "bfloat16" else int(weight.dtype.itemsize)

    def _rows(self, split: Split) -> Rows:
        source = RowSource(split, self.layer)
        spec = split.spec(self.layer)
        return Rows(
            split.n_rows, len(source.items), spec.row_bytes, source.block_rows, source.read_bytes
        )

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
        steps = list(self._blocks("moments", self._train_moments, mode, folder_of))
        steps.append(Call("measured", partial(measured_of, self), ("moments",)))
        steps += self._pair_steps(mode)
        steps += self._read_steps()
        if "ood" in reads and self.ood is not None:
            steps += self._blocks("outside", self._outside_moments, mode, folder_of)
        if "test" in reads:
            steps += self._blocks("test", self._test_moments, mode, folder_of)
        names = tuple(s.name for s in steps if s.name in _RESULTS)
        steps.append(Call("cell", partial(cell_of, self, names), names))
        return Job(self.where, tuple(steps))

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

    @property
    def _train_moments(self) -> _Read:
        holds = ["scatter"] if "scatter" in self.reads else []
        if self.options.null:
            holds.append(f"null {self.options.null_seed}")
        return _Read(
            f"moments of {self.train.name}/{self.layer}",
            self._source(self.train, self.selected.index), len(self.selected.classes),
            self._about("moments", self.train, holds=holds), self._moments_pass,
        )  # fmt: skip

    @property
    def _outside_moments(self) -> _Read:
        assert self.ood is not None
        seen = select_classes(count_labels(self.ood))
        source = self._source(self.ood, seen.index)
        return _Read(
            f"moments of {self.ood.name}/{self.layer}", source, len(seen.classes),
            self._about("moments", self.ood),
            partial(self._plain_moments, source, len(seen.classes)),
        )  # fmt: skip

    @property
    def _test_moments(self) -> _Read:
        source, k = self._source(self.decided, self.selected.index), len(self.selected.classes)
        return _Read(
            f"moments of {self.decided.name}/{self.layer} by train's classes", source, k,
            self._about("test", self.decided, train_fingerprint=self.fingerprint),
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
            about = self._about(
                name, self.train, holds=sorted(quantities), weighted=self.options.weighted,
                dist_exp=self.options.dist_exp, stored=mode.stored,
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
        if "decisions" in reads:
            source = self._source(self.decided, self._decided_index)
            yield _sweep(
                "decisions", f"decisions of {self.decided.name}/{self.layer}",
                self._decisions_pass, source, self._about_decisions(), ("measured",),
            )  # fmt: skip
        if "directional" in reads:
            yield _sweep(
                "directional", f"directional variance of {self.train.name}/{self.layer}",
                self._directional_pass, self._source(self.train, None),
                self._about("directional", self.train, weighted=self.options.weighted),
                ("measured",),
            )  # fmt: skip

    def _source(self, split: Split, index: npt.NDArray[np.int64] | None) -> RowSource:
        on_host = self.options.device == "cpu"
        return RowSource(split, self.layer, index, self.options.skip_nonfinite, on_host)

    # ---------------------------------------------------------------- what kept states depend on

    def _about(self, state: str, split: Split, **options: Any) -> About:
        mine = split.name == self.train.name
        return {
            "state": state,
            "place": f"{self.store.path}/{split.name}/{self.layer}",
            "fingerprint": self.fingerprint if mine else split.fingerprint(self.layer),
            "precision": self.options.precision,
            "skip_nonfinite": self.options.skip_nonfinite,
            "device": self.options.device,
            "version": _STATE_VERSION,
            **options,
        }

    def _about_decisions(self) -> About:
        deciding = (
            self.decided.prediction_fingerprint()
            if self.by_predictions
            else self.store.classifier_fingerprint(self.layer)
        )
        return self._about(
            "decisions", self.decided, train_fingerprint=self.fingerprint,
            classifier_fingerprint=deciding, filtered=self.selected.filtered,
        )  # fmt: skip

    # ------------------------------------------------------------------------------- its passes

    def _moments_pass(
        self, block: tuple[int, int] | None = None, rows_at: Path | None = None
    ) -> MomentsPass:
        selected = self.selected
        return MomentsPass(
            self._source(self.train, selected.index),
            len(selected.classes),
            scatter="scatter" in self.reads,
            precision=self.options.precision,
            device=self.options.device,
            null_counts=selected.counts[selected.classes] if self.options.null else None,
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
                moments.variances,
                counts=moments.counts,
                within=moments.within_covariance if "cdnv_directional" in quantities else None,
                quantities=quantities,
                dist_exp=self.options.dist_exp,
            )
        )

    @property
    def _decided_index(self) -> npt.NDArray[np.int64] | None:
        """Which samples are decided: all, or with a filter those of the classes used."""
        if not self.selected.filtered:
            return None
        return np.where(self.selected.index >= 0, np.arange(self.store.n_classes), -1)

    def _decisions_pass(self, measured: Measured) -> DecisionsPass:
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
        source = self._source(self.decided, self._decided_index)
        return DecisionsPass(source, nearest, classifier, self.options.device)

    def _directional_pass(self, measured: Measured) -> DirectionalPass:
        index = np.full(self.store.n_classes, -1, np.int64)
        index[measured.classes] = np.arange(len(measured.classes))
        means = measured.statistics.moments.means
        pairs = PairTiles(means, measured.statistics.global_mean, quantities=[])
        return DirectionalPass(self._source(self.train, index), pairs, self.options.device)


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
