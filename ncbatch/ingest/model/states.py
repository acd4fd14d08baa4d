"""StateTarget: of a dump no rows are kept but what sums them up, layer by layer."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.named_arrays import Arrays
from ncbatch.arrays.namespace import Array, first_nonfinite_row, to_numpy
from ncbatch.arrays.rows import mean_of_rows
from ncbatch.errors import DataError, StoreError, unknown_name
from ncbatch.ingest.model.head import Head
from ncbatch.ingest.model.places import Batch
from ncbatch.ingest.model.ranks import StatePlan
from ncbatch.ingest.model.room import FoldPrice, choose_place
from ncbatch.ingest.model.target import Target, wait_for
from ncbatch.states.decisions import DECISIONS, Decisions
from ncbatch.states.moments import MomentsAccumulator, moments_arrays
from ncbatch.states.moments_fold import Scratch
from ncbatch.states.rules import Rule, linear_rule, nearest_mean_rule
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.writer import checked_labels

if TYPE_CHECKING:
    import torch


# Who decides the samples of a layer that is folded: class means of a stored split, and the head.


@dataclass(frozen=True)
class Decider:
    """Who decides the samples of a layer.

    Attributes
    ----------
    nearest : Rule
        The nearest class mean.
    classifier : Rule or None
        The classifier; None where the model's own decisions are its.
    about : dict
        Which means and which classifier, by the names that stored decisions have.
    """

    nearest: Rule
    classifier: Rule | None
    about: dict[str, Any]


@dataclass(frozen=True)
class Deciding:
    """The layers that can be decided.

    Attributes
    ----------
    store : FeatureStore
        The store.
    means : str
        The split whose moments decide.
    classifiers : dict of str to (weight, bias) or None
        Who classifies; None where the model's own decisions do.
    """

    store: FeatureStore
    means: str
    classifiers: dict[str, tuple[Any, Any] | None]

    @classmethod
    def find(
        cls,
        store: FeatureStore,
        means: str,
        layers: Iterable[str],
        head: Head,
        predicted: str | None,
    ) -> Self:
        """Find who classifies each layer.

        Parameters
        ----------
        store, means
            As the attributes.
        layers : iterable of str
            The layers of the dump.
        head : Head
            The model's head, once it is settled.
        predicted : str or None
            The layer for which the model's own decisions count.

        Raises
        ------
        UnknownNameError
            When no class means of such a layer are stored.
        """
        found: dict[str, tuple[Any, Any] | None] = {}
        k, module = store.n_classes, head.module
        for name in layers:
            if name == predicted:
                found[name] = None
            elif name == head.layer and module is not None:
                # Not from the store: of several ranks one stores it, perhaps later.
                bias = None if head.bias is None else to_numpy(head.bias[:k])
                found[name] = (to_numpy(module.weight[:k]), bias)
            elif (stored := store.classifier(name)) is not None:
                found[name] = stored
        known = store.state_layers(means, "moments")
        for name in found:
            if name not in known:
                raise unknown_name("layer", name, known, f"the moments of split '{means}'")
        return cls(store, means, found)

    def n_rows(self, name: str) -> tuple[int, int]:
        """Give the class means and the rows of a classifier that decide a layer; 0 for none."""
        arrays = self.store.state_arrays(self.means, name, "moments") or {}
        given = self.classifiers[name]
        return int(arrays["class"].shape[0]), 0 if given is None else len(given[0])

    def decider(self, name: str, like: Array, operand_roundoff: float) -> Decider:
        """Make the rules of a layer.

        Parameters
        ----------
        name : str
            The layer.
        like : array
            An array of the library, device and dtype of the features.
        operand_roundoff : float
            As for `Rule`.
        """
        arrays, _ = self.store.state(self.means, name, "moments") or ({}, {})
        how: Any = {"dtype": like.dtype, "operand_roundoff": operand_roundoff}
        means = beside(like, arrays["mean"])
        nearest = nearest_mean_rule(means, beside(like, arrays["class"]), **how)
        classifier = None
        given = self.classifiers[name]
        if given is not None:
            weight, bias = (None if part is None else beside(like, part) for part in given)
            classifier = linear_rule(weight, bias, mean_of_rows(means), **how)
        return Decider(nearest, classifier, self._about(name))

    def _about(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "means_split": self.means,
            "means_fingerprint": self.store.state_fingerprint(self.means, name, "moments"),
        }
        if name in self.store.classifiers:
            found["classifier_fingerprint"] = self.store.classifier_fingerprint(name)
        return found


def beside(like: Array, values: Any) -> Array:
    """Bring an array of the host to the library and device of another array."""
    if hasattr(like, "untyped_storage"):
        import torch

        return torch.as_tensor(values, device=like.device)
    return values


class BatchLabels:
    """Labels of a batch, brought to every device of its features once."""

    def __init__(self, values: npt.NDArray[np.int64]) -> None:
        self.values = values
        self._copies: dict[Any, Array] = {}

    def beside(self, rows: Array) -> Array:
        """Give them in the library and on the device of `rows`."""
        place = (type(rows), getattr(rows, "device", None))
        if place not in self._copies:
            self._copies[place] = beside(rows, self.values)
        return self._copies[place]


def float32_roundoff() -> float:
    """Give the unit of rounding of the operands of torch's float32 products on a GPU."""
    import torch

    return {"highest": 0.0, "high": 2.0**-11}.get(torch.get_float32_matmul_precision(), 2.0**-8)


# LayerFold: the samples of one layer of a dump, folded into moments and decisions as they come.


@dataclass
class LayerFold:
    """What the samples of one layer are folded into.

    Attributes
    ----------
    n_classes : int
        K.
    moments : MomentsAccumulator or None
        Their moments, if those are wanted.
    decisions : Decisions or None
        How they were decided, if that is wanted; on the host.
    decider : Decider or None
        Who decides; None where no more samples come.
    position : int
        Samples folded.
    about : dict
        What decides, by names that the store's states have.
    """

    n_classes: int
    moments: MomentsAccumulator | None
    decisions: Decisions | None = None
    decider: Decider | None = None
    position: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> list[str]:
        """Kinds of the states that come of it."""
        kinds = (("moments", self.moments), ("decisions", self.decisions))
        return [kind for kind, state in kinds if state is not None]

    @property
    def awaits_head(self) -> bool:
        """Whether a block is folded only when the model's own decisions are there."""
        return self.decider is not None and self.decider.classifier is None

    @property
    def running_bytes(self) -> int:
        """Bytes of what `running` gives."""
        if self.moments is None:
            return 0
        return self.moments.running_bytes

    def add(self, features: Array, labels: Array, decided: Array | None) -> None:
        """Fold a block: `features` (B, D), `labels` (B,) in 0..K-1, the model's decisions (B,)."""
        if self.moments is not None:
            self.moments.add(features, labels)
        if self.decisions is not None:
            assert self.decider is not None
            classifier = decided if self.decider.classifier is None else self.decider.classifier
            block = Decisions.from_block(
                features, labels, self.n_classes, self.decider.nearest, classifier
            )
            self.decisions = self.decisions.merge(Decisions.from_arrays(block.to_arrays()))
        self.position += int(labels.shape[0])

    def running(self) -> Arrays:
        """Give all that it is so far, on the host and over the classes seen: see `restore`."""
        decisions = {} if self.decisions is None else self.decisions.to_arrays()
        return decisions | ({} if self.moments is None else self.moments.arrays())

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]], position: int) -> None:
        """Go on to the same bits from what `running` gave when `position` samples were folded.

        Raises
        ------
        DataError
            When it was given by a fold of another layer, other classes or other kinds.
        """
        self.position = position
        if self.decisions is not None:
            self.decisions = Decisions.from_arrays({name: arrays[name] for name in DECISIONS})
        if self.moments is not None:
            self.moments.restore({n: array for n, array in arrays.items() if n not in DECISIONS})

    def finish(self) -> dict[str, Arrays]:
        """Give the arrays of the finished states by kind; the fold is spent."""
        found: dict[str, Arrays] = {}
        if self.moments is not None:
            found["moments"] = moments_arrays(self.moments.seal())
            self.moments = None
        if self.decisions is not None:
            found["decisions"] = self.decisions.to_arrays()
        return found


logger = logging.getLogger("ncbatch")

# Running states are stored when so many bytes of features were folded since the last time, and
# so many times their own size: storing them then costs little beside the forward passes.
_SAVE_BYTES, _SAVE_RATIO = 256 * 2**20, 16


class StateTarget(Target):
    """Folds rows into moments, and decisions where class means are given; stores states only.

    Running states are stored from time to time with the number of samples in them, one layer after
    another. After a kill each layer goes on from its own number, to the same bits.

    Parameters
    ----------
    *args, **kwargs
        As for `Target`.
    n_samples : int or None
        Samples at most, of all ranks together, where known.
    means : str or None
        The split whose stored moments decide; None for no decisions.
    """

    def __init__(self, *args: Any, n_samples: int | None, means: str | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._n_samples, self._means = n_samples, means
        self._plan = StatePlan(
            self.store, self._split, self._places, self._share, means,
            resume=self._resume, overwrite=self._overwrite,
        )  # fmt: skip
        self._folds: dict[str, LayerFold] = {}
        self._scratch = Scratch()  # layers are folded one after another
        self._expected: BatchLabels | None = None
        self._begun, self._on_host = False, True
        self._watch: Head | None = None
        self._position, self._crc, self._unsaved = 0, 0, 0
        self.done = self._plan.done
        if self.done and not self._share.several:
            logger.info("%s is complete: nothing to resume", self._found)
        elif self.done:
            logger.info("all of rank %d is in %s: nothing to resume", self._share.rank, self._found)

    @property
    def begun(self) -> bool:
        """Whether there is something to fold into."""
        return self._begun

    @property
    def _found(self) -> str:
        return f"split '{self._split}' of {self.opened.path}"

    def resume(self, writing: ExitStack) -> int:
        """Go on where the layer that is least far stopped."""
        return self._plan.position if self._resume else 0

    def settle(self, head: Head, features: Mapping[str, torch.Tensor], predictions: bool) -> None:
        """After the first forward pass: find or make the store, find the head's layer, store it."""
        super().settle(head, features, predictions)
        self._watch = head

    # ---------------------------------------------------------------------------------- beginning

    def start(self, features: Mapping[str, torch.Tensor], writing: ExitStack) -> None:
        """Make what the rows are folded into, or take it up again, if memory suffices.

        Raises
        ------
        BudgetError
            When the states of all layers do not fit into memory.
        StoreError
            When there is nothing to fold, or what was begun was begun otherwise.
        """
        deciding = self._deciding()
        layers = {}
        for name, rows in features.items():
            decided = deciding is not None and name in deciding.classifiers
            kinds = self._plan.kinds(name, decided=decided)
            if kinds:
                layers[name] = (kinds, rows)
        if not layers:
            raise StoreError(
                f"{self._found} has moments of layers {', '.join(features)}, and no classifier reads one",
                "a layer that the head reads, for decisions",
                "add the head's input to the layers, or name the head with head=",
            )
        self._on_host = self._choose_place(layers, deciding)
        self._plan.delete_replaced()
        for name, (kinds, rows) in layers.items():
            self._folds[name] = self._fold(name, rows, kinds, deciding)
        self._begun = True

    def _deciding(self) -> Deciding | None:
        if self._means is None:
            return None
        assert self._watch is not None
        found = Deciding.find(self.opened, self._means, self._places, self._watch, self._head)
        if not found.classifiers:
            logger.warning("no decisions of split '%s': no classifier reads a layer", self._split)
        return found

    def _choose_place(
        self, layers: Mapping[str, tuple[set[str], torch.Tensor]], deciding: Deciding | None
    ) -> bool:
        prices = {}
        for name, (kinds, rows) in layers.items():
            n_means = n_weights = 0
            if "decisions" in kinds and deciding is not None:
                n_means, n_weights = deciding.n_rows(name)
            prices[name] = FoldPrice.of(
                self._most_classes, int(rows.shape[1]), len(rows), n_samples=self._n_samples,
                wide=rows.dtype.itemsize == 8, moments="moments" in kinds,
                n_means=n_means, n_weights=n_weights,
            )  # fmt: skip
        return choose_place(prices, {name: rows.device for name, (_, rows) in layers.items()})

    @property
    def _most_classes(self) -> int:
        """Classes with samples, at most."""
        k = self.opened.n_classes
        return k if self._n_samples is None else min(k, max(self._n_samples, 1))

    def _fold(
        self, name: str, rows: torch.Tensor, kinds: set[str], deciding: Deciding | None
    ) -> LayerFold:
        like = self._values(rows[:0])
        fold = LayerFold(self.opened.n_classes, None)
        if "moments" in kinds:
            fold.moments = self._accumulator(int(like.shape[1]), like)
        if "decisions" in kinds:
            assert deciding is not None
            roundoff = 0.0 if self._on_host else float32_roundoff()
            fold.decisions = Decisions.zero(fold.n_classes)
            fold.decider = deciding.decider(name, like, roundoff)
            fold.about = fold.decider.about
        if name in self._plan.saved:
            self._check_continues(name, fold)
            arrays, about = self.opened.state(self._split, name, self._plan.running) or ({}, {})
            fold.restore(arrays, int(about["position"]))
        return fold

    def _accumulator(self, n_features: int, like: Array) -> MomentsAccumulator:
        k = self.opened.n_classes
        return MomentsAccumulator(k, n_features, like=like, scratch=self._scratch)

    def _check_continues(self, name: str, fold: LayerFold) -> None:
        about = self._plan.saved[name]
        if about["holds"] != fold.holds:
            raise StoreError(
                f"{' and '.join(about['holds'])} of layer '{name}' in {self._found} were begun",
                " and ".join(fold.holds) + ", as this process was asked for",
                "resume with the same arguments, or start again with overwrite=True",
            )
        for key in ("means_split", "means_fingerprint"):
            if about["about"].get(key) != fold.about.get(key):
                raise StoreError(
                    f"decisions of layer '{name}' in {self._found} were begun with other class means",
                    f"those of split '{self._means}' as they are now",
                    "start again with overwrite=True",
                )

    # ------------------------------------------------------------------------------------ folding

    def expect(self, batch: Batch) -> None:
        """Take the labels of the batch that comes, unless its forward pass decides them."""
        self._expected = None
        if self._begun and self._labels_given:
            self._expected = self._checked(batch.labels)

    def receive(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """Fold rows as soon as they are there; those that must wait for the head are given back."""
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
        given = self._expected or self._checked(labels)
        self._expected = None
        for name in self._folds:
            rows = features[name]
            if rows is not None:
                self._fold_rows(name, rows, given, decisions)
        self._count(labels)
        self._save_if_due()

    def _checked(self, labels: npt.NDArray[Any]) -> BatchLabels:
        k = self.opened.n_classes
        return BatchLabels(checked_labels(labels, "label", k, self._position).astype(np.int64))

    def _fold_rows(
        self, name: str, rows: torch.Tensor, labels: BatchLabels, decisions: torch.Tensor | None
    ) -> None:
        """Fold the rows of a batch into a layer, unless it was saved with them in it."""
        fold, first, n = self._folds[name], self._position, len(labels.values)
        if fold.position >= first + n:
            return
        if fold.position != first:
            raise self._other_batches()
        values = self._values(rows)
        bad = first_nonfinite_row(values)
        if bad is not None:
            raise DataError(
                f"layer '{name}' row {first + bad} holds NaN or an infinity",
                "finite features",
                "leave the layer out, or mark such positions by negative labels",
            )
        decided: Any = decisions if fold.awaits_head else None
        if decided is not None:
            decided = to_numpy(decided) if self._on_host else decided.to(values.device)
        fold.add(values, labels.beside(values), decided)
        self._unsaved += n * int(values.shape[1]) * 4

    def check_skipped(self, batch: Batch) -> None:
        """Refuse to skip rows that are not the ones folded: other batches would be mixed in."""
        self._skipped += len(batch.skipped)
        if len(batch.skipped):
            self._count(batch.skipped)

    def _count(self, labels: npt.NDArray[Any]) -> None:
        """Go past samples; where a running state was stored the labels before must be those then."""
        self._position += len(labels)
        if not self._labels_given:
            return
        self._crc = zlib.crc32(np.asarray(labels, np.int64).tobytes(), self._crc)
        for about in self._plan.saved.values():
            if int(about["position"]) == self._position and about["labels"] != self._crc:
                raise self._other_batches()

    def _other_batches(self) -> DataError:
        return DataError(
            f"other labels among the first {self._position} samples",
            f"those folded into split '{self._split}' before the interruption",
            "resume with the same batches in the same order",
        )

    def _values(self, rows: torch.Tensor) -> Array:
        """Give rows as they are folded: float32 or float64, on the host or where they are."""
        wide = rows.float() if rows.dtype.itemsize < 4 else rows
        wide = wide.contiguous()
        return to_numpy(wide) if self._on_host else wide

    def _save_if_due(self) -> None:
        if self._unsaved < _SAVE_BYTES:  # counting the classes seen waits for the GPU
            return
        size = sum(fold.running_bytes for fold in self._folds.values())
        if self._unsaved < _SAVE_RATIO * size:
            return
        self._unsaved = 0
        for name, fold in self._folds.items():
            if fold.position == self._position:
                self._save(name, fold)

    def _save(self, name: str, fold: LayerFold) -> None:
        about = {
            "position": fold.position,
            "labels": self._crc if self._labels_given else None,
            "world_size": self._share.world_size,
            "holds": fold.holds,
            "about": fold.about,
        }
        self.opened.set_state(self._split, name, self._plan.running, fold.running(), about)

    # ----------------------------------------------------------------------------------- the end

    def end(self, missing: int, writing: ExitStack) -> None:
        """Store the states, one layer after another."""
        super().end(missing, writing)
        if not self._begun and self._plan.saved:
            self._take_up()
        if not self._begun and not self._share.several:
            raise DataError("no sample in any batch", "at least one label that is not negative")
        if not self._begun:
            self._end_without_rows()
            return
        ahead = max(fold.position for fold in self._folds.values())
        if ahead != self._position:
            raise DataError(
                f"batches of {self._position} samples",
                f"the {ahead} already folded, and those to come",
                "resume with the same batches in the same order",
            )
        layers = {name: fold.holds for name, fold in self._folds.items()}
        for name in layers:
            self._finish(name, self._folds.pop(name), layers)

    def _take_up(self) -> None:
        """All samples were folded before the interruption: only the end is left to do."""
        self._on_host = True
        for name, about in self._plan.saved.items():
            arrays, _ = self.opened.state(self._split, name, self._plan.running) or ({}, {})
            fold = LayerFold(self.opened.n_classes, None, about=about["about"])
            if "moments" in about["holds"]:
                like = arrays["pilots"][:0]
                fold.moments = self._accumulator(int(like.shape[1]), like)
            if "decisions" in about["holds"]:
                fold.decisions = Decisions.zero(fold.n_classes)
            fold.restore(arrays, int(about["position"]))
            self._folds[name] = fold
        self._begun = True

    def _finish(self, name: str, fold: LayerFold, layers: dict[str, list[str]]) -> None:
        store, split, n, holds = self.opened, self._split, fold.position, fold.holds
        states, about = fold.finish(), dict[str, Any](n_samples=n)
        if self._share.several:
            arrays = {key: array for state in states.values() for key, array in state.items()}
            part = {"holds": holds, "layers": layers, "about": fold.about}
            about |= {"world_size": self._share.world_size, **part}
            store.set_state(split, name, self._plan.part, arrays, about)
        else:
            for kind, arrays in states.items():
                own = fold.about if kind == "decisions" else {}
                store.set_state(split, name, kind, arrays, about | own)
        store.delete_state(split, name, self._plan.running)

    def _end_without_rows(self) -> None:
        """Say for every layer that this rank had no samples."""
        self.store = wait_for(self._open_again, self._share.rank)
        about = dict[str, Any](n_samples=0, world_size=self._share.world_size)
        about |= {"holds": [], "layers": {}, "about": {}}
        for name in self._places:
            empty = {"class": np.empty(0, np.int64)}
            self.opened.set_state(self._split, name, self._plan.part, empty, about)
