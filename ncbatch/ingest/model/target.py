"""Where a dump goes: the store, found or made, its classifier, and what rows and moments share."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError, StoreError, UsageError
from ncbatch.ingest.model.head import Head
from ncbatch.ingest.model.places import Batch, Place
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.format import DTYPES, check_name
from ncbatch.store.place import is_remote, is_there
from ncbatch.store.ranks import Share

if TYPE_CHECKING:
    import torch


logger = logging.getLogger("ncbatch")
Result = TypeVar("Result")
Identity: TypeAlias = Mapping[str, str | int]

_VALUES = 64  # of every parameter are hashed: training changes all of them

# How long a rank without samples waits for another one to begin.
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Request:
    """What a dump is asked for; what no store allows is refused at once.

    Attributes
    ----------
    store : FeatureStore or path
        Made after the first forward pass where nothing is.
    split : str
        The split.
    places : mapping of str to Place
        Where each layer is captured.
    dtype : str or None
        How layers are stored; None for as the store has them, float16 in a new one.
    n_classes : int or None
        K of a store to be made; None for the head's number of outputs.
    share : Share
        Which of several processes this is.
    n_samples : int or None
        Samples at most, of all ranks together, where known.
    resume, overwrite : bool
        What to do with what is there.
    labels_given : bool
        Whether the labels of the batches are those of the samples, and not the head's decisions.
    identity : mapping of str to str or int
        What the rows depend on; a dump that goes on must have been begun with the same.
    """

    store: FeatureStore | str | os.PathLike[str]
    split: str
    places: Mapping[str, Place]
    dtype: str | None
    n_classes: int | None
    share: Share
    n_samples: int | None = None
    resume: bool = False
    overwrite: bool = False
    labels_given: bool = True
    identity: Identity = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("split", self.split)
        # Before the model runs, and before a store is made that would remain.
        if self.dtype not in (None, *DTYPES):
            raise UsageError(f"dtype '{self.dtype}'", "one of: " + ", ".join(DTYPES))
        if self.resume and self.overwrite:
            raise UsageError("both resume and overwrite", "one of them")
        if self.overwrite and self.share.several:
            raise UsageError(
                "overwrite with several ranks, where the last one would delete the others' work",
                "one process that deletes before they begin",
                f"run 'ncbatch delete' (store.delete_split('{self.split}')) first",
            )


class Target(ABC):
    """The store that a dump fills; `RowTarget` keeps rows in it, `StateTarget` what sums them up.

    Attributes
    ----------
    request : Request
        What was asked for.
    store : FeatureStore or None
        The store, once there is one.
    n_classes : int or None
        Its K, or that of the store to be made.
    done : bool
        Whether there is nothing left to do.
    begins : bool
        Whether what the split is begun with is recorded.
    ready : bool
        Whether the first forward pass has told all that is needed: then rows can be received
        while the model runs.
    """

    kind: ClassVar[str]  # what is kept, as `FeatureStore.begun_with` calls it

    def __init__(self, request: Request) -> None:
        self.request = request
        self.store = open_if_there(request.store)
        self.n_classes = request.n_classes
        if self.store is not None:
            _check_classes(self.store, request.n_classes)
            self.n_classes = self.store.n_classes
        self.done = False
        self.begins = True
        self.ready = False
        self._head: str | None = None  # the layer whose predictions are kept
        self._skipped = 0

    @property
    def opened(self) -> FeatureStore:
        """The store, once there is one."""
        assert self.store is not None
        return self.store

    def open_again(self) -> FeatureStore | None:
        """Open the store once another process has made it."""
        if self.store is None:
            self.store = open_if_there(self.request.store)
        return self.store

    @property
    def named(self) -> str:
        """What messages call the split."""
        return f"split '{self.request.split}' of {self.opened.path}"

    @property
    @abstractmethod
    def continues(self) -> bool:
        """Whether this goes on with, or joins, what some process has begun."""

    @abstractmethod
    def resume(self, writing: ExitStack) -> int:
        """Go on where an earlier process stopped; returns the samples that were kept already."""

    @abstractmethod
    def start(self, features: Mapping[str, torch.Tensor], writing: ExitStack) -> None:
        """Begin to keep, unless `resume` did; the first batch tells the widths.

        What is entered on `writing` ends with the dump.
        """

    @abstractmethod
    def receive(self, name: str, rows: torch.Tensor) -> Any:
        """Take rows of a layer as soon as they are there, while the model still runs.

        Called for every batch after the first one, inside the hook: what is kept of one layer is
        then no longer on the model's device when the next one runs. What it returns is what
        `append` gets.
        """

    @abstractmethod
    def append(
        self, features: Mapping[str, Any], labels: npt.NDArray[Any], decisions: torch.Tensor | None
    ) -> None:
        """Keep the rows of a batch."""

    @abstractmethod
    def expect(self, batch: Batch) -> None:
        """Hear of the batch that the model is about to read, unless it skips all of it.

        Refuses to skip rows that are not the ones kept: other batches would be mixed in.
        """

    def check_identity(self) -> None:
        """Refuse to go on with what was begun with another model or other data."""
        if self.store is None or not self.continues:
            return
        begun = self.store.begun_with(self.request.split, self.kind)
        for what, value in self.request.identity.items():
            # What only one of both says does not count: callers may come to say more.
            if what in begun and begun[what] != value:
                raise StoreError(
                    f"{self.named} was begun with {what} {begun[what]}",
                    f"{value}, as this dump was asked for",
                    "go on with the same model, texts and options, "
                    "or delete the split first (ncbatch delete)",
                )

    def begin(
        self,
        head: Head,
        features: Mapping[str, torch.Tensor],
        predictions: bool,
        writing: ExitStack,
    ) -> None:
        """After the first forward pass: settle store and head, and begin to keep."""
        self.settle(head, features, predictions)
        self.start(features, writing)
        self.check_identity()  # once more: of several ranks another may have begun meanwhile
        split = self.request.split
        # Of an earlier dump that has ended the record may be there still: it is replaced.
        if self.begins and not (self.continues and self.opened.begun_with(split, self.kind)):
            self.opened.set_begun_with(split, self.kind, self.request.identity)
        self.ready = True

    def settle(self, head: Head, features: Mapping[str, torch.Tensor], predictions: bool) -> None:
        """Find or make the store, find the layer that the head reads, store the classifier."""
        head.settle(features, self.request.places)
        if self.store is None:
            self.store = self._make_store(head, features)
        if head.layer is not None:
            self._set_classifier(head, head.layer)
        elif head.candidates and not self.store.classifiers:
            _warn_unmatched(head)
        if head.decides:
            head.check_outputs(self.store.n_classes)
        self._head = head.layer if predictions else None

    def end(self, missing: int, writing: ExitStack) -> None:
        """All batches were given; refuse if `missing` samples of those kept were not among them."""
        if missing:
            raise DataError(
                f"batches of {self._skipped} samples",
                f"the {self._skipped + missing} already stored, and those to come",
                "resume with the same batches in the same order",
            )

    def _check_several(self) -> None:
        """Refuse to end without samples: of several ranks one may have none."""
        if not self.request.share.several:
            raise DataError("no sample in any batch", "at least one label that is not negative")

    def _make_store(self, head: Head, features: Mapping[str, torch.Tensor]) -> FeatureStore:
        if self.n_classes is None:
            if head.module is None:
                raise DataError(
                    "no number of classes: no torch.nn.Linear ran", remedy="give n_classes="
                )
            self.n_classes = int(head.module.out_features)
        widths = {name: int(rows.shape[1]) for name, rows in features.items()}
        path = self.request.store
        assert not isinstance(path, FeatureStore)  # or it would have been open from the start
        store = make_store(path, self.n_classes, widths, self.request.dtype or "float16")
        # Another process may have made it while the model ran, for other classes.
        _check_classes(store, self.n_classes)
        return store

    def _set_classifier(self, head: Head, layer: str) -> None:
        """Store weight and bias, unless they are stored; never mix two models unasked."""
        k = self.opened.n_classes
        head.check_outputs(k)
        first = self.request.share.rank == 0
        assert head.module is not None
        n_outputs = head.module.out_features
        if n_outputs > k and first:
            logger.warning(
                "the first %d of %d rows of '%s' are its classifier", k, n_outputs, head.path
            )
        weight, bias = head.classifier(k)
        stored = self.opened.classifier(layer)
        # Compared as stored: a bfloat16 weight comes back as float32.
        if stored is not None:
            if _same(stored[0], weight) and _same(stored[1], bias):
                return
            if not self.request.overwrite:
                raise DataError(
                    f"'{head.path}' differs from the classifier stored for layer '{layer}'",
                    "one model per store",
                    "use a store per checkpoint, or overwrite=True, "
                    "or head=False to keep the stored one",
                )
        # Of several ranks one writes it: two would delete each other's arrays.
        if first:
            self.opened.set_classifier(layer, weight, bias)


def weights_hash(model: torch.nn.Module) -> str:
    """Hash the names, shapes and first values of all parameters; 12 hexadecimal digits."""
    import torch

    digest = hashlib.sha256()
    # A few values of each tell checkpoints apart without copying all weights from a GPU.
    for name, values in model.named_parameters():
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        if values.device.type != "meta" and values.numel():
            first = values.detach().reshape(-1)[:_VALUES].cpu().contiguous()
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def stored_dtype(
    store: FeatureStore | None,
    split: str,
    layers: Iterable[str],
    asked: str | None,
    default: str = "float16",
    *,
    overwrite: bool = False,
) -> str:
    """Choose how layers are stored: as asked, else as the store has or declares them.

    Parameters
    ----------
    store : FeatureStore or None
        The store, if there is one.
    split : str
        The split to be written.
    layers : iterable of str
        The layers to be written, in one dtype.
    asked : str or None
        What the user asked for. It also replaces what is declared but has no rows yet.
    default : str, optional
        What layers get where the store says nothing of any.
    overwrite : bool, optional
        Whether the split will be replaced, so that its own rows do not matter.

    Raises
    ------
    UsageError
        When the store has rows of a declared layer in another dtype than the one asked for, or
        has layers of several dtypes.
    """
    if store is None:
        return asked or default
    # Of each layer a split with rows of it, and their dtype; the split itself comes first.
    held: dict[str, tuple[str, str]] = {}
    layout = store.layout(split)
    # Ranks that have begun but committed no row yet: the split is not among `store.splits`.
    if layout is not None:
        held = {name: (split, spec.dtype) for name, spec in layout.layers.items()}
    for other in sorted(store.splits, key=lambda name: name != split):
        part = store.split(other)
        for name in () if overwrite and other == split else part.features:
            held.setdefault(name, (other, part.spec(name).dtype))
    declared = {name: spec.dtype for name, spec in store.declared_layers.items()}
    known = declared | {name: dtype for name, (_, dtype) in held.items()}
    dtypes = {name: known[name] for name in layers if name in known}
    if asked is None and len(set(dtypes.values())) > 1:
        raise UsageError(
            "layers of several dtypes: "
            + ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items()),
            "one dtype for layers that are written together",
            "set dtype= to the one declared, or dump the others afterwards",
        )
    # What is new is stored like the others: one call writes one dtype.
    dtype = asked or next(iter(dtypes.values()), default)
    for name in dtypes:
        where, stored = held.get(name, ("", dtype))
        if name in declared and stored != dtype:
            raise UsageError(
                f"dtype {dtype} for layer '{name}'",
                f"{stored}, as in split '{where}' of {store.path}",
                "leave --dtype (dtype=) out, or write into another store",
            )
    return dtype


def make_store(
    path: str | os.PathLike[str], n_classes: int, widths: Mapping[str, int], dtype: str
) -> FeatureStore:
    """Make a store, or open the one that another process has made meanwhile."""
    where = os.fspath(path)
    if is_remote(where):
        try:
            return FeatureStore.create(where, n_classes, widths, dtype)
        except StoreError:
            return FeatureStore.open(where)
    # It is made under a name of its own and takes the final one in one step: of several processes
    # one succeeds, and the others find its store.
    home = Path(where)
    partial = home.with_name(f".{home.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        FeatureStore.create(partial, n_classes, widths, dtype)
    except StoreError as error:
        problem = error.found.replace(str(partial), where)
        raise StoreError(problem, error.expected, error.remedy) from error
    try:
        partial.rename(home)
    except OSError:  # it is there: FeatureStore.open says whether it is a store
        (partial / "zarr.json").unlink()
        partial.rmdir()
    return FeatureStore.open(where)


def open_if_there(store: FeatureStore | str | os.PathLike[str]) -> FeatureStore | None:
    """Open a store, unless it is one or nothing is there."""
    if isinstance(store, FeatureStore):
        return store
    return FeatureStore.open(store) if is_there(store) else None


def wait_for(look: Callable[[], Result | None], rank: int) -> Result:
    """Wait for what another rank makes, as a rank without samples must.

    Raises
    ------
    DataError
        When it does not come.
    """
    deadline = time.monotonic() + PATIENCE_S
    logger.info("rank %d has no samples: it goes on once another has begun", rank)
    while (result := look()) is None:
        if time.monotonic() > deadline:
            raise DataError(
                f"no sample in any batch of rank {rank}, and no other rank has begun",
                "samples on one of the ranks, at least",
                "run this rank again with resume=True when another has begun",
            )
        time.sleep(min(0.2, PATIENCE_S))  # nothing tells of a change in a shared folder
    return result


def _check_classes(store: FeatureStore, n_classes: int | None) -> None:
    if n_classes not in (None, store.n_classes):
        raise UsageError(f"n_classes={n_classes}", f"{store.n_classes}, as in {store.path}")


def _same(stored: npt.NDArray[Any] | None, values: npt.NDArray[Any] | None) -> bool:
    if stored is None or values is None:
        return stored is values
    return np.array_equal(stored, values.astype(stored.dtype))


def _warn_unmatched(head: Head) -> None:
    if head.path is None:
        logger.warning("no classifier stored: no torch.nn.Linear ran; head= names the one to store")
    else:
        logger.warning(
            "no classifier and no predictions stored: no captured layer is the input of '%s', row "
            "by row; add '%s:input' to the layers, or set head=",
            head.path,
            head.path,
        )
