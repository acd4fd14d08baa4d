"""StatePlan: which states a dump has to make, given those that are stored already."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ncbatch.errors import StoreError, unknown_name
from ncbatch.ingest.merging import PART, RUNNING
from ncbatch.store import FeatureStore
from ncbatch.store.commit_records import Share


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
