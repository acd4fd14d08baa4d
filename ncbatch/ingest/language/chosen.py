"""Which samples are taken when every class may give only so many."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ncbatch.ingest.language.scratch import Column

_BLOCK = 2**18
_Part = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64], npt.NDArray[np.int64]]


def random_draws(start: int, stop: int, seed: int) -> npt.NDArray[np.uint64]:
    """Draw a number for every position from `start` to `stop`; it depends on position and seed only.

    Notes
    -----
    The generator is Philox-4x64 (Salmon et al. 2011): position p has the word p of its stream,
    which comes in counters of four words.
    """
    first = start // 4
    words = np.random.Philox(key=seed % 2**64).advance(first).random_raw(stop - 4 * first)
    return words[start - 4 * first :]


def lowest_per_class(labels: Column, cap: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose of every class the samples with the lowest random draws.

    Parameters
    ----------
    labels : Column
        The label of every position; those below 0 are no samples.
    cap : int
        How many of a class are chosen at most.
    seed : int
        Which draws.

    Returns
    -------
    array of int64
        The chosen positions, in order.

    Notes
    -----
    Memory is that of the chosen and of one block: labels are read block by block, and a class that
    has its `cap` samples takes only lower draws than its highest from then on.
    """
    lowest = _Lowest(cap)
    for start in range(0, len(labels), _BLOCK):
        block = labels.read(start, start + _BLOCK)
        places = np.flatnonzero(block >= 0)
        draws = random_draws(start, start + len(block), seed)
        lowest.add(block[places], draws[places], places + start)
    return lowest.positions()


class _Lowest:
    """The lowest draws of each class so far."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        # Labels, draws and positions: what the last merge left, then what came since.
        self._parts: list[_Part] = []
        self._n_merged, self._n_since = 0, 0
        # Classes that have all their samples, and the highest draw among them.
        self._full = np.empty(0, np.int32)
        self._highest = np.empty(0, np.uint64)

    def add(
        self,
        labels: npt.NDArray[np.int32],
        draws: npt.NDArray[np.uint64],
        positions: npt.NDArray[np.int64],
    ) -> None:
        if len(self._full):
            at = np.minimum(np.searchsorted(self._full, labels), len(self._full) - 1)
            lower = (self._full[at] != labels) | (draws < self._highest[at])
            labels, draws, positions = labels[lower], draws[lower], positions[lower]
        self._parts.append((labels, draws, positions))
        self._n_since += len(labels)
        # Merging sorts everything: it waits until there is as much new as old.
        if self._n_since >= max(self._n_merged, _BLOCK):
            self._merge()

    def positions(self) -> npt.NDArray[np.int64]:
        self._merge()
        return np.sort(self._parts[0][2])

    def _merge(self) -> None:
        labels, draws, positions = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = np.lexsort((draws, labels))
        ordered = labels[order]
        rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # within the class
        last = rank == self._cap - 1
        self._full, self._highest = ordered[last], draws[order[last]]
        order = order[rank < self._cap]
        self._parts = [(labels[order], draws[order], positions[order])]
        self._n_merged, self._n_since = len(order), 0
