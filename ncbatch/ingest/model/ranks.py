"""States of a split that ranks are making: what each has stored, what is missing, and the merge."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ncbatch.arrays.named_arrays import Arrays
from ncbatch.errors import CorruptionError, StoreError, unknown_name
from ncbatch.states.decisions import DECISIONS, Decisions
from ncbatch.states.moments import Moments, moments_arrays, moments_of
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.ranks import Share
from ncbatch.store.states import PART, RUNNING

if TYPE_CHECKING:
    from ncbatch.ingest.model.target import Request

logger = logging.getLogger("ncbatch")

# How long a process that has the turn, and whose end is not known otherwise, may store nothing.
PATIENCE_S = 300.0
_TURN = "finalizing"


def finalize(store: FeatureStore | str | os.PathLike[str], split: str) -> FeatureStore:
    """Complete a split that several ranks dumped, once all have ended; one process calls this.

    Rows are completed by `FeatureStore.finalize`; states of the ranks are merged in the order of
    their ranks. A split that is complete stays as it is, and what was interrupted can be repeated.

    Parameters
    ----------
    store : FeatureStore or path
        The store.
    split : str
        The split.

    Returns
    -------
    FeatureStore
        The store.

    Raises
    ------
    UnknownNameError
        When nothing of such a split is there.
    StoreError
        Names the ranks that have not begun or not ended.
    """
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    _complete(opened, split)
    opened.release(split, _TURN)  # which a process that was killed did not
    return opened


def finalize_if_last(store: FeatureStore, split: str) -> bool:
    """Complete a split if all its ranks have ended; else return False.

    Every rank may call this when it has ended: the last one completes the split. Of states one
    process at a time looks whether it is the last.

    Raises
    ------
    CorruptionError
        When something that was stored is missing.
    """
    with _turn(store, split) if split in store.state_splits else nullcontext():
        try:
            _complete(store, split)
        except CorruptionError:
            raise
        except StoreError as error:  # others are still at work
            logger.info("split '%s' is not completed yet: %s", split, error)
            return False
    return True


def complete_resumed(store: FeatureStore, split: str, share: Share) -> str:
    """Do what is left when a rank is resumed that has nothing left to keep; says what is the case.

    The last rank may have been killed after it stored its own part and before it merged all.
    """
    if not share.several or finalize_if_last(store, split):
        return f"split '{split}' of {store.path} is complete: nothing to resume"
    return (
        f"rank {share.rank} of split '{split}' of {store.path} is complete, the split is not: "
        f"'ncbatch finalize {store.path} --split {split}' names the ranks that have not ended"
    )


def _complete(store: FeatureStore, split: str) -> None:
    states = RankStates(store, split)
    states.check_ended()
    for layer in sorted({part.layer for part in states.parts}):
        states.merge(layer)
    # Rows and states may both be there; and of a split that is not there the store says so.
    rows = split in store.splits or store.layout(split) is not None
    if rows or split not in store.state_splits:
        store.finalize(split)


@contextmanager
def _turn(store: FeatureStore, split: str) -> Iterator[None]:
    """Wait for the turn of this process, which ends with the ``with``."""
    # The turn of a process that has ended is taken over: at once where it ran on this machine, else
    # when nothing in the split has changed for a while. Two that complete a split at once store the
    # same; at worst one of them stops with an error.
    token = f"{_machine()} {os.getpid()} {uuid.uuid4()}"
    holder = kinds = None
    deadline = 0.0
    while not store.claim(split, _TURN, token):
        claimant = store.claimant(split, _TURN)
        if claimant != holder:
            holder = claimant
            kinds = None
            deadline = time.monotonic() + PATIENCE_S
        elif time.monotonic() > deadline and kinds != (stored := store.state_kinds(split)):
            # It merges: each layer that is done changes what is there.
            kinds = stored
            deadline = time.monotonic() + PATIENCE_S
        elif holder is not None and (_process_has_ended(holder) or time.monotonic() > deadline):
            logger.warning(
                "a process began to complete split '%s' of %s and stopped: this one goes on",
                split,
                store.path,
            )
            _give_back(store, split, holder)
            continue
        time.sleep(min(0.1, PATIENCE_S))
    try:
        yield
    finally:
        _give_back(store, split, token)


def _give_back(store: FeatureStore, split: str, holder: str) -> None:
    if store.claimant(split, _TURN) == holder:  # or another has taken it over
        store.release(split, _TURN)


def _process_has_ended(holder: str) -> bool:
    # Of processes on other machines nothing is known.
    machine, pid, *_ = [*holder.split(" "), ""]
    return machine == _machine() and pid.isdecimal() and not psutil.pid_exists(int(pid))


def _machine() -> str:
    # A number is used again after a restart, and by each container: all of that is in the name.
    parts = [socket.gethostname()]
    with suppress(OSError):  # neither is there on every system
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts).replace(" ", "-")


def state_arrays(state: Moments | Decisions) -> Arrays:
    """Take a state apart into the arrays that a store has of it."""
    return moments_arrays(state) if isinstance(state, Moments) else state.to_arrays()


@dataclass(frozen=True)
class Part:
    """What one rank stored of one layer: a running state, or all that it folded."""

    layer: str
    rank: int
    kind: str
    about: Mapping[str, Any]

    @property
    def ended(self) -> bool:
        """Whether it is all that the rank folded."""
        return self.kind.startswith(PART)


class RankStates:
    """The states of the ranks of one split.

    Attributes
    ----------
    parts : list of Part
        What they stored; of a rank that has ended a layer, the part and no running state.
    """

    def __init__(self, store: FeatureStore, split: str) -> None:
        self._store = store
        self._split = split
        self._kinds = set(store.state_kinds(split))
        parts: dict[tuple[str, int], Part] = {}
        for layer, kind in sorted(self._kinds, reverse=True):  # running states before parts
            prefix, _, rank = kind.rpartition("-")
            if f"{prefix}-" in (RUNNING, PART) and rank.isdecimal():
                about = store.state_attributes(split, layer, kind)
                parts[layer, int(rank)] = Part(layer, int(rank), kind, about)
        self.parts = sorted(parts.values(), key=lambda part: (part.layer, part.rank))

    def check_ended(self) -> None:
        """Refuse to merge while a rank is at work, or where ranks do not belong together.

        Raises
        ------
        StoreError
            Names them.
        """
        where = f"split '{self._split}' of {self._store.path}"
        merged = {part.layer for part in self.parts if self._is_merged(part.layer)}
        parts = [part for part in self.parts if part.layer not in merged]
        if not parts:  # an earlier call was interrupted while it deleted the last ones
            return
        sizes = sorted({int(part.about["world_size"]) for part in parts})
        if len(sizes) > 1:
            raise StoreError(
                f"{where} holds states of jobs of {' and '.join(map(str, sizes))} ranks",
                "those of one job",
                f"'ncbatch delete' (store.delete_split('{self._split}')), then dump it anew",
            )
        begun = {part.rank for part in parts}
        absent = [str(rank) for rank in range(sizes[0]) if rank not in begun]
        working = [str(rank) for rank in sorted(begun) if not self._has_ended(rank)]
        problems = [f"no states of rank {', '.join(absent)}"] if absent else []
        problems += [f"no end of rank {', '.join(working)}"] if working else []
        if problems:
            raise StoreError(
                f"{where} has {' and '.join(problems)}",
                f"all of 0..{sizes[0] - 1} ended",
                "let them end; resume those that stopped, and begin those that never did",
            )
        if not any(part.about["holds"] for part in parts):
            raise StoreError(f"{where}: no rank had a sample", "samples on one, at least")

    def _is_merged(self, layer: str) -> bool:
        """Whether all that the parts of a layer hold is there as a whole."""
        parts = [part for part in self.parts if part.layer == layer]
        merged = {(layer, kind) for part in parts for kind in part.about["holds"]}
        return bool(merged) and all(part.ended for part in parts) and merged <= self._kinds

    def _has_ended(self, rank: int) -> bool:
        """Whether a rank has stored all the layers that it folded."""
        parts = {part.layer: part for part in self.parts if part.rank == rank}
        return all(part.ended for part in parts.values()) and all(
            layer in parts or {(layer, kind) for kind in kinds} <= self._kinds  # merged already
            for part in parts.values()
            for layer, kinds in part.about["layers"].items()
        )

    def merge(self, layer: str) -> None:
        """Merge the parts of a layer, store the result and delete the parts."""
        parts = [part for part in self.parts if part.layer == layer]
        for kind in ("moments", "decisions"):
            holders = [part for part in parts if kind in part.about["holds"]]
            # It is there when an earlier call was interrupted while it deleted the parts.
            if holders and (layer, kind) not in self._kinds:
                self._merge_kind(layer, kind, holders)
        for part in parts:
            for prefix in (RUNNING, PART):
                self._store.delete_state(self._split, layer, f"{prefix}{part.rank}")

    def _merge_kind(self, layer: str, kind: str, parts: list[Part]) -> None:
        about = {"n_samples": sum(int(part.about["n_samples"]) for part in parts)}
        if kind == "decisions":
            about |= self._decided_by(layer, parts)
        merged: Any = None
        # One after another, in the order of the ranks: the same bits whoever ended first.
        for part in parts:
            arrays, _ = self._store.state(self._split, layer, part.kind) or ({}, {})
            state: Any = moments_of(arrays)
            if kind == "decisions":
                state = Decisions.from_arrays({name: arrays[name] for name in DECISIONS})
            merged = state if merged is None else merged.merge(state)
        self._store.set_state(self._split, layer, kind, state_arrays(merged), about)

    def _decided_by(self, layer: str, parts: list[Part]) -> dict[str, Any]:
        deciding = [part.about["about"] for part in parts]
        if len({about.get("means_fingerprint") for about in deciding}) > 1:
            raise StoreError(
                f"ranks that decided layer '{layer}' of split '{self._split}' by different means",
                "the class means of one split, unchanged",
                f"'ncbatch delete' (store.delete_split('{self._split}')), then dump it anew",
            )
        # Rank 0 stores the classifier: others may have begun before it was there.
        known = (about for about in deciding if "classifier_fingerprint" in about)
        return next(known, deciding[0])


class StatePlan:
    """What is missing of the states of some layers, and what an interrupted process left.

    Parameters
    ----------
    store : FeatureStore or None
        The store, if there is one.
    request : Request
        What the dump is asked for.
    means : str or None
        The split whose moments decide; None for no decisions.

    Attributes
    ----------
    running, part : str
        Kinds of the states of this rank: what it has folded so far, and in all.
    saved : dict of str to dict
        What is recorded beside the running states of this rank, by layer.

    Raises
    ------
    StoreError
        When states are there, and nothing says what to do with them.
    UnknownNameError
        When no moments are stored of split `means`.
    """

    def __init__(self, store: FeatureStore | None, request: Request, means: str | None) -> None:
        self._store = store
        self._request = request
        self._means = means
        self.running = f"{RUNNING}{request.share.rank}"
        self.part = f"{PART}{request.share.rank}"
        self._check_means()
        stored: dict[str, set[str]] = {name: set() for name in request.places}
        for layer, kind in () if store is None else store.state_kinds(request.split):
            if layer in stored:
                stored[layer].add(kind)
        # Read once: a store of many layers and ranks holds thousands of groups.
        # Moments that decide about the split itself are not replaced.
        lasting = {"moments"} if means == request.split else set()
        kept = {name: kinds & lasting for name, kinds in stored.items()}
        self._stored = kept if request.overwrite else stored
        self._replaced = {name: kinds - self._stored[name] for name, kinds in stored.items()}
        wanted = {"moments"} if means is None else {"moments", "decisions"}
        self._wanted = {name: wanted - kinds for name, kinds in self._stored.items()}
        self.saved: dict[str, dict[str, Any]] = {}
        if store is not None and not request.overwrite:
            self._check_job(store)
            self._check_stored(f"split '{request.split}' of {store.path}")
            self.saved = dict(self._find_saved(store))

    def _check_means(self) -> None:
        if self._means is None:
            return
        splits = [] if self._store is None else self._store.state_splits
        if self._store is None or self._means not in splits:
            if self._store is not None and self._means in self._store.splits:
                raise StoreError(
                    f"split '{self._means}' of {self._store.path} holds rows, "
                    "and no moments that decide",
                    "moments of that split",
                    f"store them first: the dump of '{self._means}' once more with --moments "
                    "(moments=True)",
                )
            raise unknown_name("split with moments", self._means, splits)
        known = self._store.state_layers(self._means, "moments")
        layers = self._request.places
        if not any(name in known for name in layers):
            raise StoreError(
                f"split '{self._means}' holds no moments of layers {', '.join(layers)}",
                f"its layers: {', '.join(known) or 'none'}",
                "fold that split first, with moments=True and the same layers",
            )

    def _check_job(self, store: FeatureStore) -> None:
        """Refuse what processes of a job of another size left: it is not this one's."""
        split = self._request.split
        share = self._request.share
        mine = {self.running, self.part}
        parts = [(kind, name) for name, kinds in self._stored.items() for kind in kinds]
        ours = [part for part in parts if part[0] in mine]
        others = [part for part in parts if part[0].startswith((RUNNING, PART))]
        for kind, name in (*ours, *sorted({*others} - {*ours})[:1]):  # one of them tells enough
            # Another process may just have merged it: then it has no attributes any more.
            about = store.state_attributes(split, name, kind)
            size = about.get("world_size", share.world_size)
            if size != share.world_size:
                raise StoreError(
                    f"states of split '{split}' were begun by {size} ranks",
                    f"{share.world_size}, as this one was told",
                    "give rank= and world_size= as they were; or complete the split "
                    "(ncbatch finalize), or delete it (ncbatch delete)",
                )

    def _check_stored(self, named: str) -> None:
        """Refuse what is there, unless a process goes on or joins others."""
        if self._request.resume:
            return
        share = self._request.share
        mine = {self.running, self.part}
        begun = [name for name, kinds in self._stored.items() if kinds & mine]
        if begun:
            again = "'ncbatch delete' (store.delete_split)" if share.several else "overwrite=True"
            raise StoreError(
                f"rank {share.rank} of {share.world_size} has begun layers "
                f"{', '.join(begun)} of {named}",
                remedy=f"go on with resume=True, or start again with {again}",
            )
        ready = [name for name, kinds in self._wanted.items() if not kinds]
        if ready:
            kinds = "moments" if self._means is None else "moments and decisions"
            raise StoreError(
                f"{named} has {kinds} of layers {', '.join(ready)}",
                "new layers, or a new split",
                "leave them out, or replace them with overwrite=True",
            )

    def _find_saved(self, store: FeatureStore) -> Iterable[tuple[str, dict[str, Any]]]:
        split = self._request.split
        for name, kinds in self._stored.items():
            running = self.running in kinds
            about = store.state_attributes(split, name, self.running) if running else {}
            # Killed after it had stored the end, before it deleted this.
            if about and (self._is_ready(name) or kinds >= set(about["holds"])):
                store.delete_state(split, name, self.running)
            elif about:
                yield name, about

    def _is_ready(self, name: str) -> bool:
        """Whether the states of a layer are stored, those of this rank or all."""
        return self.part in self._stored[name] or not self._wanted[name]

    def _is_done(self, name: str) -> bool:
        """Whether this rank has nothing left to do for a layer."""
        if self._is_ready(name):
            return True
        if name in self.saved or "moments" in self._wanted[name] or self._store is None:
            return False
        return name not in self._store.classifiers  # decisions are missing, and cannot be had

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self._request.resume and all(map(self._is_done, self._stored))

    @property
    def position(self) -> int:
        """Samples that every layer still to be folded holds already."""
        missing = [name for name in self._stored if not self._is_done(name)]
        # Layers were saved one after another: some may be ahead, and skip rows by themselves.
        return min(int(self.saved.get(name, {}).get("position", 0)) for name in missing)

    def kinds(self, name: str, *, decided: bool) -> set[str]:
        """Choose the kinds to be made of a layer, which can be `decided` or not."""
        if self._is_ready(name):
            return set()
        kinds = self._wanted[name] - (set() if decided else {"decisions"})
        begun = set(self.saved.get(name, {}).get("holds", ()))
        # Of two that were begun together one may have been finished: it is made once more.
        again = bool(kinds) and kinds <= begun and begun - kinds <= self._stored[name]
        return begun if again else kinds

    def delete_replaced(self, store: FeatureStore) -> None:
        """Delete what is to be replaced, so that a kill leaves nothing that looks complete."""
        for name, kinds in self._replaced.items():
            for kind in kinds:
                if kind in ("moments", "decisions") or kind.startswith((RUNNING, PART)):
                    store.delete_state(self._request.split, name, kind)
