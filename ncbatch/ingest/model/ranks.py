"""The end of a dump by several ranks: rows are completed, parts of states merged."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ncbatch.errors import CorruptionError, StoreError, unknown_name
from ncbatch.states.decisions import DECISIONS, Decisions
from ncbatch.states.moments import moments_arrays, moments_of
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.ranks import Share
from ncbatch.store.states import PART, RUNNING

# Taking turns: of several processes one at a time looks whether it can complete a split.


# How long a process that has the turn, and whose end is not known otherwise, may store nothing.
PATIENCE_S = 300.0
_TURN = "finalizing"


def take_turn(store: FeatureStore, split: str) -> str:
    """Wait until it is this process's turn; gives what `give_back` takes.

    The turn of a process that has ended is taken over: at once where it ran on this machine, else
    when nothing in the split has changed for a while. Two that complete a split at once store the
    same; at worst one of them stops with an error.
    """
    own = f"{_machine()} {os.getpid()} {uuid.uuid4()}"
    holder, deadline, kinds = None, 0.0, None
    while not store.claim(split, _TURN, own):
        now = store.claimant(split, _TURN)
        if now != holder:
            holder, deadline, kinds = now, time.monotonic() + PATIENCE_S, None
        elif time.monotonic() > deadline and kinds != (found := store.state_kinds(split)):
            deadline, kinds = time.monotonic() + PATIENCE_S, found
        elif holder is not None and (_has_ended(holder) or time.monotonic() > deadline):
            logger.warning(
                "a process began to complete split '%s' of %s and stopped: this one goes on",
                split, store.path,
            )  # fmt: skip
            give_back(store, split, holder)
            continue
        time.sleep(min(0.1, PATIENCE_S))
    return own


def give_back(store: FeatureStore, split: str, holder: str | None = None) -> None:
    """Let the next one have its turn; with `holder` only if it is that one's."""
    if holder is None or store.claimant(split, _TURN) == holder:
        store.release(split, _TURN)


def _has_ended(holder: str) -> bool:
    """Whether the process ran on this machine and is no more; of others nothing is known."""
    machine, _, rest = holder.partition(" ")
    pid = rest.partition(" ")[0]
    return machine == _machine() and pid.isdecimal() and not psutil.pid_exists(int(pid))


def _machine() -> str:
    """Name the machine, since when it runs, and whose process numbers these are."""
    found = [socket.gethostname()]
    with suppress(OSError):  # neither is there on every system
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(found).replace(" ", "-")


logger = logging.getLogger("ncbatch")


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
    give_back(opened, split)  # which a process that was killed did not
    return opened


def _complete(store: FeatureStore, split: str) -> None:
    states = RankStates.of(store, split)
    if states.parts:
        states.check_ended()
        for layer in sorted({part.layer for part in states.parts}):
            states.merge(layer)
    rows = split in store.splits or store.layout(split) is not None
    if rows or split not in store.state_splits:
        store.finalize(split)


def finalize_if_last(store: FeatureStore, split: str) -> bool:
    """Complete a split if all its ranks have ended; else say False.

    Every rank may call this when it has ended: the last one completes the split. Of states one
    process at a time looks whether it is the last.

    Raises
    ------
    CorruptionError
        When something that was stored is missing.
    """
    turn = take_turn(store, split) if split in store.state_splits else None
    try:
        _complete(store, split)
    except CorruptionError:
        raise
    except StoreError as error:  # others are still at work
        logger.info("split '%s' is not completed yet: %s", split, error)
        return False
    finally:
        if turn is not None:
            give_back(store, split, turn)
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


@dataclass(frozen=True)
class RankStates:
    """The states of the ranks of one split.

    Attributes
    ----------
    store : FeatureStore
        The store.
    split : str
        The split.
    parts : tuple of Part
        What they stored; of a rank that has ended a layer, the part and no running state.
    """

    store: FeatureStore
    split: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, store: FeatureStore, split: str) -> RankStates:
        """Find them."""
        found: dict[tuple[str, int], Part] = {}
        for layer, kind in store.state_kinds(split):
            for prefix in (RUNNING, PART):
                rank = kind.removeprefix(prefix)
                if kind.startswith(prefix) and rank.isdecimal():
                    about = store.state_attributes(split, layer, kind)
                    part = Part(layer, int(rank), kind, about)
                    if part.ended or (layer, int(rank)) not in found:
                        found[layer, int(rank)] = part
        return cls(store, split, tuple(found.values()))

    def check_ended(self) -> None:
        """Refuse to merge while a rank is at work, or where ranks do not belong together.

        Raises
        ------
        StoreError
            Names them.
        """
        where = f"split '{self.split}' of {self.store.path}"
        there = set(self.store.state_kinds(self.split))
        merged = {layer for layer, _ in there if self._is_merged(layer, there)}
        parts = [part for part in self.parts if part.layer not in merged]
        if not parts:  # an earlier call was interrupted while it deleted the last ones
            return
        sizes = sorted({int(part.about["world_size"]) for part in parts})
        if len(sizes) > 1:
            raise StoreError(
                f"{where} holds states of jobs of {' and '.join(map(str, sizes))} ranks",
                "those of one job",
                f"'ncbatch delete' (store.delete_split('{self.split}')), then dump it anew",
            )
        ranks = range(sizes[0])
        begun = {part.rank for part in parts}
        lists = {
            "no states of rank": [rank for rank in ranks if rank not in begun],
            "no end of rank": [rank for rank in ranks if rank in begun and not self._ended(rank)],
        }
        found = [f"{what} {', '.join(map(str, who))}" for what, who in lists.items() if who]
        if found:
            raise StoreError(
                f"{where} has {' and '.join(found)}", f"all of 0..{sizes[0] - 1} ended",
                "let them end; resume those that stopped, and begin those that never did",
            )  # fmt: skip
        if not any(part.about["holds"] for part in parts):
            raise StoreError(f"{where}: no rank had a sample", "samples on one, at least")

    def _is_merged(self, layer: str, there: set[tuple[str, str]]) -> bool:
        """Whether all that the parts of a layer hold is there as a whole."""
        own = [part for part in self.parts if part.layer == layer]
        held = {kind for part in own for kind in part.about["holds"]}
        ended = all(part.ended for part in own)
        return bool(held) and ended and all((layer, kind) in there for kind in held)

    def _ended(self, rank: int) -> bool:
        """Whether a rank has stored all the layers that it folded."""
        own = {part.layer: part for part in self.parts if part.rank == rank}
        if not all(part.ended for part in own.values()):
            return False
        there = set(self.store.state_kinds(self.split))
        return all(
            layer in own or all((layer, kind) in there for kind in kinds)  # merged already
            for part in own.values()
            for layer, kinds in part.about["layers"].items()
        )

    def merge(self, layer: str) -> None:
        """Merge the parts of a layer, store the whole and delete the parts."""
        parts = sorted((p for p in self.parts if p.layer == layer), key=lambda part: part.rank)
        there = self.store.state_kinds(self.split)
        for kind in ("moments", "decisions"):
            holders = [part for part in parts if kind in part.about["holds"]]
            # It is there when an earlier call was interrupted while it deleted the parts.
            if holders and (layer, kind) not in there:
                self._merge_kind(layer, kind, holders)
        for part in parts:
            for prefix in (RUNNING, PART):
                self.store.delete_state(self.split, layer, f"{prefix}{part.rank}")

    def _merge_kind(self, layer: str, kind: str, parts: list[Part]) -> None:
        deciding = [part.about["about"] for part in parts] if kind == "decisions" else [{}]
        if len({about.get("means_fingerprint") for about in deciding}) > 1:
            raise StoreError(
                f"ranks that decided layer '{layer}' of split '{self.split}' by different means",
                "the class means of one split, unchanged",
                f"'ncbatch delete' (store.delete_split('{self.split}')), then dump it anew",
            )
        whole: Any = None
        for part in parts:
            arrays, _ = self.store.state(self.split, layer, part.kind) or ({}, {})
            state: Any = moments_of(arrays)
            if kind == "decisions":
                state = Decisions.from_arrays({name: arrays[name] for name in DECISIONS})
            whole = state if whole is None else whole.merge(state)
        values = whole.to_arrays() if kind == "decisions" else moments_arrays(whole)
        about = {"n_samples": sum(int(part.about["n_samples"]) for part in parts)}
        about |= next(
            (found for found in deciding if "classifier_fingerprint" in found), deciding[0]
        )
        self.store.set_state(self.split, layer, kind, values, about)


# StatePlan: which states a dump has to make, given those that are stored already.


class StatePlan:
    """What is missing of the states of some layers, and what an interrupted process left.

    Parameters
    ----------
    store : FeatureStore or None
        The store, if there is one.
    split : str
        The split.
    layers : iterable of str
        The layers of the dump.
    share : Share
        Which of several processes this is.
    means : str or None
        The split whose moments decide; None for no decisions.
    resume, overwrite : bool
        What to do with what is there.

    Raises
    ------
    StoreError
        When states are there, and nothing says what to do with them.
    UnknownNameError
        When no moments are stored of split `means`.
    """

    def __init__(
        self,
        store: FeatureStore | None,
        split: str,
        layers: Iterable[str],
        share: Share,
        means: str | None,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self._store, self._split, self._share, self._means = store, split, share, means
        self._resume, self._overwrite = resume, overwrite
        self.layers = list(layers)
        self.running, self.part = f"{RUNNING}{share.rank}", f"{PART}{share.rank}"
        self._stored = {name: self._stored_kinds(name) for name in self.layers}
        self._check_means()
        self._wanted = {name: self._wanted_of(name) for name in self.layers}
        self.saved: dict[str, dict[str, Any]] = {}
        if store is not None and not overwrite:
            self._check_job(store)
            self._check_stored(f"split '{split}' of {store.path}")
            self.saved = dict(self._find_saved(store))

    def _stored_kinds(self, name: str) -> set[str]:
        kinds = () if self._store is None else self._store.state_kinds(self._split)
        return {kind for layer, kind in kinds if layer == name}

    def _check_means(self) -> None:
        if self._means is None:
            return
        splits = [] if self._store is None else self._store.state_splits
        if self._store is None or self._means not in splits:
            raise unknown_name("split with moments", self._means, splits)
        known = self._store.state_layers(self._means, "moments")
        if not any(name in known for name in self.layers):
            raise StoreError(
                f"split '{self._means}' holds no moments of layers {', '.join(self.layers)}",
                f"its layers: {', '.join(known) or 'none'}",
                "fold that split first, with moments=True and the same layers",
            )

    @property
    def _kept(self) -> set[str]:
        """Kinds that are not replaced: the means that decide are those of the split itself."""
        own = self._means == self._split
        return {"moments"} if own or not self._overwrite else set()

    def _wanted_of(self, name: str) -> set[str]:
        """Say which kinds are missing; whether decisions can be had shows later."""
        wanted = {"moments"} if self._means is None else {"moments", "decisions"}
        return wanted - (self._stored[name] & self._kept if self._overwrite else self._stored[name])

    def _check_stored(self, found: str) -> None:
        """Refuse what is there, unless a process goes on or joins others."""
        if self._resume:
            return
        begun = [name for name in self.layers if self._stored[name] & {self.running, self.part}]
        if begun:
            several = self._share.several
            again = "'ncbatch delete' (store.delete_split)" if several else "overwrite=True"
            raise StoreError(
                f"rank {self._share.rank} of {self._share.world_size} has begun layers "
                f"{', '.join(begun)} of {found}",
                remedy=f"go on with resume=True, or start again with {again}",
            )
        ready = [name for name in self.layers if not self._wanted[name]]
        if ready:
            kinds = "moments" if self._means is None else "moments and decisions"
            raise StoreError(
                f"{found} has {kinds} of layers {', '.join(ready)}",
                "new layers, or a new split",
                "leave them out, or replace them with overwrite=True",
            )

    def _check_job(self, store: FeatureStore) -> None:
        """Refuse what processes of a job of another size left: it is not this one's."""
        another = False
        for name in self.layers:
            for kind in sorted(self._stored[name]):
                own = kind in (self.running, self.part)
                if not kind.startswith((RUNNING, PART)) or (another and not own):
                    continue
                about = store.state_attributes(self._split, name, kind)
                if about:  # another process may just have merged it
                    self._check_ranks(int(about["world_size"]))
                    another |= not own  # one of the others tells as much as all

    def _find_saved(self, store: FeatureStore) -> Iterable[tuple[str, dict[str, Any]]]:
        """Give what is recorded beside the running states of this rank."""
        for name in self.layers:
            about = store.state_attributes(self._split, name, self.running)
            if about and self._ready(name):  # killed while it ended
                store.delete_state(self._split, name, self.running)
            elif about:
                yield name, about

    def _check_ranks(self, world_size: int) -> None:
        if world_size != self._share.world_size:
            raise StoreError(
                f"states of split '{self._split}' were begun by {world_size} ranks",
                f"{self._share.world_size}, as this one was told",
                "give rank= and world_size= as they were; or complete the split (ncbatch finalize), "
                "or delete it (ncbatch delete)",
            )

    def _ready(self, name: str) -> bool:
        stored = self.part in self._stored[name] and not self._overwrite
        return stored or not self._wanted[name]

    def _is_done(self, name: str) -> bool:
        """Whether this rank has nothing left to do for a layer."""
        if self._ready(name):
            return True
        if name in self.saved or "moments" in self._wanted[name] or self._store is None:
            return False
        return name not in self._store.classifiers  # decisions are missing, and cannot be had

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self._resume and not self._overwrite and all(map(self._is_done, self.layers))

    @property
    def position(self) -> int:
        """Samples that every layer still to be folded holds already."""
        left = [name for name in self.layers if not self._is_done(name)]
        return min(int(self.saved.get(name, {}).get("position", 0)) for name in left)

    def kinds(self, name: str, *, decided: bool) -> set[str]:
        """Give the kinds to be made of a layer, which can be `decided` or not."""
        if self._ready(name):
            return set()
        kinds = self._wanted[name] - (set() if decided else {"decisions"})
        begun = set(self.saved.get(name, {}).get("holds", ()))
        # Of two that were begun together one may have been finished: it is made once more.
        again = bool(kinds) and kinds <= begun and begun - kinds <= self._stored[name]
        return begun if again else kinds

    def delete_replaced(self) -> None:
        """Delete what is to be replaced, so that a kill leaves nothing that looks complete."""
        if not self._overwrite or self._store is None:
            return
        for name in self.layers:
            for kind in self._stored[name] - self._kept:
                if kind in ("moments", "decisions") or kind.startswith((RUNNING, PART)):
                    self._store.delete_state(self._split, name, kind)
