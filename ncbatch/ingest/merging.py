"""The end of a dump by several ranks: rows are completed, parts of states merged."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ncbatch.errors import CorruptionError, StoreError
from ncbatch.ingest.folding import DECISIONS, moments_arrays, moments_of
from ncbatch.ingest.turns import give_back, take_turn
from ncbatch.stats import Decisions
from ncbatch.store import FeatureStore
from ncbatch.store.commit_records import Share

logger = logging.getLogger("ncbatch")

# Kinds of states of one rank: what it has folded so far, and what it has folded in all.
RUNNING, PART = "running-", "part-"


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


def unmerged_layers(store: FeatureStore, split: str) -> list[str]:
    """Name the layers of which only parts, or running states, are there yet."""
    there = store.state_kinds(split)
    found: dict[str, None] = {}
    for layer, kind in there:
        if layer in found or not kind.startswith((RUNNING, PART)):
            continue
        holds = store.state_attributes(split, layer, kind).get("holds", ())
        # Decisions that are being added to finished moments keep nobody from measuring those.
        wanted = holds if kind.startswith(PART) else {"moments"} & set(holds)
        if any((layer, each) not in there for each in wanted):
            found[layer] = None
    return list(found)


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
                state = Decisions(*(arrays[name] for name in DECISIONS))
            whole = state if whole is None else whole.merge(state)
        values = dict(vars(whole)) if kind == "decisions" else moments_arrays(whole)
        about = {"n_samples": sum(int(part.about["n_samples"]) for part in parts)}
        about |= next(
            (found for found in deciding if "classifier_fingerprint" in found), deciding[0]
        )
        self.store.set_state(self.split, layer, kind, values, about)
