"""Of a dump no rows are kept but what sums them up, layer by layer: moments, and decisions."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.named_arrays import Arrays
from ncbatch.arrays.namespace import Array, first_nonfinite_row, to_numpy
from ncbatch.arrays.rows import mean_of_rows
from ncbatch.errors import DataError, StoreError, unknown_name
from ncbatch.ingest.model.head import Head
from ncbatch.ingest.model.places import Batch
from ncbatch.ingest.model.ranks import StatePlan, state_arrays
from ncbatch.ingest.model.room import FoldPrice, choose_place
from ncbatch.ingest.model.target import Request, Target, wait_for
from ncbatch.states.decisions import DECISIONS, Decisions
from ncbatch.states.fold import Fold, StateFold
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.moments_fold import Scratch
from ncbatch.states.rules import Rule, linear_rule, nearest_mean_rule
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.states import PART, RUNNING
from ncbatch.store.writer import checked_labels

if TYPE_CHECKING:
    import torch


logger = logging.getLogger("ncbatch")

# Running states are stored when so many bytes of features were folded since the last time, and
# so many times their own size: storing them then costs little beside the forward passes.
_SAVE_BYTES = 256 * 2**20
_SAVE_RATIO = 16


class Deciding:
    """The layers whose samples can be decided, by the moments of a stored split and by classifiers.

    Parameters
    ----------
    store : FeatureStore
        The store.
    means : str
        The split whose moments decide.
    layers : iterable of str
        The layers of the dump.
    head : Head
        The model's head, once it is settled.
    predicted : str or None
        The layer for which the model's own decisions count.

    Attributes
    ----------
    classifiers : dict of str to (weight, bias) or None
        Who classifies; None where the model's own decisions do.

    Raises
    ------
    UnknownNameError
        When no class means of such a layer are stored.
    """

    def __init__(
        self,
        store: FeatureStore,
        means: str,
        layers: Iterable[str],
        head: Head,
        predicted: str | None,
    ) -> None:
        self._store = store
        self._means = means
        self.classifiers: dict[str, tuple[Any, Any] | None] = {}
        for name in layers:
            # The head's not from the store: of several ranks one stores it, perhaps later.
            of_head = name == head.layer
            parts = head.classifier(store.n_classes) if of_head else store.classifier(name)
            if parts is not None:
                self.classifiers[name] = None if name == predicted else parts
        known = store.state_layers(means, "moments")
        for name in self.classifiers:
            if name not in known:
                raise unknown_name("layer", name, known, f"the moments of split '{means}'")

    def n_rows(self, name: str) -> tuple[int, int]:
        """Count the class means and the rows of a classifier that decide a layer; 0 for none."""
        arrays = self._store.state_arrays(self._means, name, "moments") or {}
        classifier = self.classifiers[name]
        return int(arrays["class"].shape[0]), 0 if classifier is None else len(classifier[0])

    def decide_by(
        self, name: str, like: Array, operand_roundoff: float
    ) -> Callable[[Array, Array, Array | None], Decisions]:
        """Make what decides blocks of a layer, of the library, device and dtype of `like`.

        It takes features (B, D), labels (B,) and the model's own decisions (B,).
        """
        arrays, _ = self._store.state(self._means, name, "moments") or ({}, {})
        how: dict[str, Any] = {"dtype": like.dtype, "operand_roundoff": operand_roundoff}
        means = _beside(like, arrays["mean"])
        nearest = nearest_mean_rule(means, _beside(like, arrays["class"]), **how)
        classifier: Rule | None = None
        parts = self.classifiers[name]
        if parts is not None:
            weight, bias = (None if part is None else _beside(like, part) for part in parts)
            classifier = linear_rule(weight, bias, mean_of_rows(means), **how)
        k = self._store.n_classes

        def decide(features: Array, labels: Array, decided: Array | None) -> Decisions:
            chosen = decided if classifier is None else classifier
            return Decisions.from_block(features, labels, k, nearest, chosen)

        return decide

    def about(self, name: str) -> dict[str, Any]:
        """Say which means and which classifier decide, by the names that stored decisions have."""
        about: dict[str, Any] = {
            "means_split": self._means,
            "means_fingerprint": self._store.state_fingerprint(self._means, name, "moments"),
        }
        if name in self._store.classifiers:
            about["classifier_fingerprint"] = self._store.classifier_fingerprint(name)
        return about


@dataclass
class LayerFold:
    """What the samples of one layer of a dump are folded into as they come.

    Attributes
    ----------
    folds : dict of str to Fold
        By the kind of state that comes of it, ``moments`` and ``decisions``.
    awaits_head : bool
        Whether a block is folded only when the model's own decisions are there.
    about : dict
        What decides, by names that the store's states have.
    position : int
        Samples folded.
    """

    folds: dict[str, Fold[Any]] = field(default_factory=dict)
    awaits_head: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    position: int = 0

    @property
    def running_bytes(self) -> int:
        """Bytes of what `running` returns, but for K numbers."""
        moments = self.folds.get("moments")
        return moments.running_bytes if isinstance(moments, MomentsAccumulator) else 0

    def add(self, features: Array, labels: Array, decided: Array | None) -> None:
        """Fold a block: `features` (B, D), `labels` (B,) in 0..K-1, the model's decisions (B,)."""
        for kind, fold in self.folds.items():
            fold.add(features, labels, *([decided] if kind == "decisions" else []))
        self.position += int(labels.shape[0])

    def running(self) -> Arrays:
        """Return all that it is so far, on the host: see `restore`."""
        arrays: Arrays = {}
        for fold in self.folds.values():
            arrays |= fold.arrays()
        return arrays

    def restore(self, arrays: Arrays, position: int) -> None:
        """Go on to the same bits from what `running` returned after `position` samples."""
        # A running state is stored as one, so that both kinds are of the same samples.
        for kind, fold in self.folds.items():
            decisions = kind == "decisions"
            fold.restore({n: array for n, array in arrays.items() if (n in DECISIONS) == decisions})
        self.position = position


class StateTarget(Target):
    """Folds rows into moments, and decisions where class means are given; stores states only.

    Running states are stored from time to time with the number of samples in them, one layer after
    another. After a kill each layer goes on from its own number, to the same bits.

    Parameters
    ----------
    request : Request
        What was asked for.
    means : str or None
        The split whose stored moments decide; None for no decisions.
    """

    kind = "moments"

    def __init__(self, request: Request, means: str | None) -> None:
        super().__init__(request)
        self._means = means
        self._plan = StatePlan(self.store, request, means)
        self._folds: dict[str, LayerFold] = {}
        self._scratch = Scratch()  # layers are folded one after another
        self._expected: npt.NDArray[np.int64] | None = None  # labels of the batch
        self._on_host = True
        self._deciding: Deciding | None = None
        self._position = 0
        self._crc = 0  # of all labels so far
        self._unsaved = 0  # bytes of features since running states were stored
        self.done = self._plan.done

    @property
    def continues(self) -> bool:
        """Whether states of some process are there that is not complete."""
        # Read anew each time: other ranks come and go.
        if self.store is None or self.request.overwrite:
            return False
        return any(
            layer in self.request.places and kind.startswith((RUNNING, PART))
            for layer, kind in self.store.state_kinds(self.request.split)
        )

    def resume(self, writing: ExitStack) -> int:
        """Go on where the layer that is least far stopped."""
        split = self.request.split
        if self.store is not None and split in self.store.splits:
            features = self.store.split(split).features
            both = [name for name in self.request.places if name in features]
            if both:
                logger.warning(
                    "split '%s' has rows of %s too: they are measured, "
                    "and the moments serve as means only",
                    split,
                    ", ".join(both),
                )
        return self._plan.position if self.request.resume else 0

    def settle(self, head: Head, features: Mapping[str, torch.Tensor], predictions: bool) -> None:
        """Find or make the store, store the classifier, and find who decides which layers."""
        super().settle(head, features, predictions)
        if self._means is not None:
            layers = self.request.places
            self._deciding = Deciding(self.opened, self._means, layers, head, self._head)
            if not self._deciding.classifiers:
                logger.warning(
                    "no decisions of split '%s': no classifier reads a layer", self.request.split
                )

    def start(self, features: Mapping[str, torch.Tensor], writing: ExitStack) -> None:
        """Make what the rows are folded into, or take it up again, if memory suffices.

        Raises
        ------
        BudgetError
            When the states of all layers do not fit into memory.
        StoreError
            When there is nothing to fold, or what was begun was begun otherwise.
        """
        decided_by: dict[str, tuple[int, int]] = {}
        if self._deciding is not None:
            decided_by = {name: self._deciding.n_rows(name) for name in self._deciding.classifiers}
        kinds = {name: self._plan.kinds(name, decided=name in decided_by) for name in features}
        layers = {name: rows for name, rows in features.items() if kinds[name]}
        if not layers:
            raise StoreError(
                f"{self.named} has moments of layers {', '.join(features)}, "
                "and no classifier reads one",
                "a layer that the head reads, for decisions",
                "add the head's input to the layers, or name the head with head=",
            )
        prices = {
            name: FoldPrice.of(
                self.opened.n_classes,
                rows.shape,
                itemsize=max(rows.dtype.itemsize, 4),
                n_samples=self.request.n_samples,
                moments="moments" in kinds[name],
                decided_by=decided_by.get(name, ()) if "decisions" in kinds[name] else (),
            )
            for name, rows in layers.items()
        }
        # All layers or none go to GPUs: labels and decisions then have one place.
        self._on_host = choose_place(prices, {name: rows.device for name, rows in layers.items()})
        self._plan.delete_replaced(self.opened)
        for name, rows in layers.items():
            self._begin_layer(name, kinds[name], self._values(rows[:0]))

    def _begin_layer(self, name: str, kinds: Iterable[str], like: Array | None) -> None:
        """Begin to fold rows like those of `like` (0, D), or go on with a running state."""
        fold = self._folds[name] = LayerFold()
        saved = self._plan.saved.get(name)
        arrays: Arrays = {}
        if saved is not None:
            split = self.request.split
            arrays, _ = self.opened.state(split, name, self._plan.running) or (arrays, {})
            fold.about = saved["about"]
        k = self.opened.n_classes
        if "moments" in kinds:
            # Without rows, at the end, the pilots tell which library and dtype it was.
            like = arrays["pilots"][:0] if like is None else like
            fold.folds["moments"] = MomentsAccumulator(
                k, int(like.shape[1]), like=like, scratch=self._scratch
            )
        if "decisions" in kinds:
            decide = None
            if self._deciding is not None:
                roundoff = 0.0 if self._on_host else _float32_roundoff()
                decide = self._deciding.decide_by(name, like, roundoff)
                fold.awaits_head = self._deciding.classifiers[name] is None
                fold.about = self._deciding.about(name)
            fold.folds["decisions"] = StateFold(Decisions.zero(k), decide)
        if saved is not None:
            self._check_continues(name, fold, saved)
            fold.restore(arrays, int(saved["position"]))

    def _check_continues(self, name: str, fold: LayerFold, saved: Mapping[str, Any]) -> None:
        if saved["holds"] != list(fold.folds):
            raise StoreError(
                f"{' and '.join(saved['holds'])} of layer '{name}' in {self.named} were begun",
                " and ".join(fold.folds) + ", as this process was asked for",
                "resume with the same arguments, or start again with overwrite=True",
            )
        for key in ("means_split", "means_fingerprint"):
            if saved["about"].get(key) != fold.about.get(key):
                raise StoreError(
                    f"decisions of layer '{name}' in {self.named} were begun with "
                    "other class means",
                    f"those of split '{self._means}' as they are now",
                    "start again with overwrite=True",
                )

    def expect(self, batch: Batch) -> None:
        """Take the labels of the batch that comes, unless its forward pass decides them."""
        self._skipped += len(batch.skipped)
        self._count(batch.skipped)
        self._expected = None
        if self._folds and self.request.labels_given:
            self._expected = self._check_labels(batch.labels)

    def receive(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """Fold rows as soon as they are there; those that must wait for the head are returned."""
        fold = self._folds.get(name)
        if fold is None:  # its states are stored
            return None
        if self._expected is None or fold.awaits_head:
            return rows
        self._fold_rows(name, rows, self._expected, None)
        return None

    def append(
        self,
        features: Mapping[str, torch.Tensor | None],
        labels: npt.NDArray[Any],
        decisions: torch.Tensor | None,
    ) -> None:
        """Fold the rows of a batch into every layer that does not hold them yet."""
        checked = self._check_labels(labels)
        for name in self._folds:
            rows = features[name]
            if rows is not None:
                self._fold_rows(name, rows, checked, decisions)
        self._count(labels)
        self._save_if_due()

    def _check_labels(self, labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        k = self.opened.n_classes
        return checked_labels(labels, "label", k, self._position).astype(np.int64)

    def _fold_rows(
        self,
        name: str,
        rows: torch.Tensor,
        labels: npt.NDArray[np.int64],
        decisions: torch.Tensor | None,
    ) -> None:
        """Fold the rows of a batch into a layer, unless it was saved with them in it."""
        fold = self._folds[name]
        first = self._position
        n = len(labels)
        # Layers are saved one after another: after a kill some are ahead of others.
        if fold.position >= first + n:
            return
        if fold.position != first:
            raise self._other_batches()
        values = self._values(rows)
        # One NaN would spoil the state of all rows, and nobody could tell which it was.
        bad = first_nonfinite_row(values)
        if bad is not None:
            raise DataError(
                f"layer '{name}' row {first + bad} holds NaN or an infinity",
                "finite features",
                "leave the layer out, or mark such positions by negative labels",
            )
        decided: Any = None
        if fold.awaits_head and decisions is not None:
            decided = to_numpy(decisions) if self._on_host else decisions.to(values.device)
        fold.add(values, _beside(values, labels), decided)
        self._unsaved += n * int(values.shape[1]) * 4

    def _count(self, labels: npt.NDArray[Any]) -> None:
        """Go past samples; those before a running state must be the ones folded into it."""
        self._position += len(labels)
        if not self.request.labels_given:
            return
        # A checksum instead of the labels, which a store of moments does not have.
        self._crc = zlib.crc32(np.asarray(labels, np.int64).tobytes(), self._crc)
        for about in self._plan.saved.values():
            if int(about["position"]) == self._position and about["labels"] != self._crc:
                raise self._other_batches()

    def _other_batches(self) -> DataError:
        return DataError(
            f"other labels among the first {self._position} samples",
            f"those folded into split '{self.request.split}' before the interruption",
            "resume with the same batches in the same order",
        )

    def _values(self, rows: torch.Tensor) -> Array:
        """Convert rows to what is folded: float32 or float64, on the host or where they are."""
        # 16 bits are exact in float32, and half as much to move as float64.
        wide = rows.float() if rows.dtype.itemsize < 4 else rows
        wide = wide.contiguous()
        return to_numpy(wide) if self._on_host else wide

    def _save_if_due(self) -> None:
        # Second, for counting the classes seen waits for the GPU.
        sizes = (fold.running_bytes for fold in self._folds.values())
        if self._unsaved < _SAVE_BYTES or self._unsaved < _SAVE_RATIO * sum(sizes):
            return
        self._unsaved = 0
        # A layer that is ahead of the batches has been saved with them in it.
        for name, fold in self._folds.items():
            if fold.position == self._position:
                crc = self._crc if self.request.labels_given else None
                about = {"position": fold.position, "labels": crc, **self._about(fold)}
                split = self.request.split
                self.opened.set_state(split, name, self._plan.running, fold.running(), about)

    def end(self, missing: int, writing: ExitStack) -> None:
        """Store the states, one layer after another."""
        super().end(missing, writing)
        if not self._folds:  # all samples were folded before the interruption, or there are none
            for name, saved in self._plan.saved.items():
                self._begin_layer(name, saved["holds"], None)
        if not self._folds:
            self._check_several()
            wait_for(self.open_again, self.request.share.rank)
        ahead = max((fold.position for fold in self._folds.values()), default=self._position)
        if ahead != self._position:
            raise DataError(
                f"batches of {self._position} samples",
                f"the {ahead} already folded, and those to come",
                "resume with the same batches in the same order",
            )
        layers = {name: list(fold.folds) for name, fold in self._folds.items()}
        # A rank without samples says so for every layer: others wait for it.
        for name in layers or self.request.places:
            fold = self._folds.pop(name, LayerFold())
            self._store_states(name, fold, {"layers": layers, **self._about(fold)})

    def _about(self, fold: LayerFold) -> dict[str, Any]:
        """Make the record of every running state and part."""
        return {
            "world_size": self.request.share.world_size,
            "holds": list(fold.folds),
            "about": fold.about,
        }

    def _store_states(self, name: str, fold: LayerFold, part: Mapping[str, Any]) -> None:
        """Store what a layer was folded into: its states, or of several ranks `part` of them."""
        store = self.opened
        split = self.request.split
        about = {"n_samples": fold.position}
        # Sealed one after another, and let go of: a fold is as large as its state.
        states = {kind: state_arrays(fold.folds.pop(kind).seal()) for kind in list(fold.folds)}
        if self.request.share.several:
            arrays = {key: array for state in states.values() for key, array in state.items()}
            # A state has one array at least.
            arrays = arrays or {"class": np.empty(0, np.int64)}
            store.set_state(split, name, self._plan.part, arrays, {**about, **part})
        else:
            for kind, arrays in states.items():
                decided_by = fold.about if kind == "decisions" else {}
                store.set_state(split, name, kind, arrays, about | decided_by)
        # Last: a kill before leaves both, and what is complete counts.
        store.delete_state(split, name, self._plan.running)


def _beside(like: Array, values: Any) -> Array:
    """Bring an array of the host to the library and device of another array."""
    if hasattr(like, "untyped_storage"):
        import torch

        return torch.as_tensor(values, device=like.device)
    return values


def _float32_roundoff() -> float:
    """Look up the unit of rounding of the operands of torch's float32 products on a GPU."""
    import torch

    # TF32 keeps 10 bits after the point, bfloat16, which "medium" may take, 7.
    return {"highest": 0.0, "high": 2.0**-11}.get(torch.get_float32_matmul_precision(), 2.0**-8)
