"""Folds: samples as they come, until they are a state; and what a block of samples must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from array_api_compat import device, is_torch_array

from ncbatch.arrays.named_arrays import Arrays, NamedArrays
from ncbatch.arrays.namespace import Array, namespace
from ncbatch.errors import DataError

State = TypeVar("State", bound=NamedArrays)
StateOut = TypeVar("StateOut", covariant=True)


class Fold(Protocol[StateOut]):
    """What blocks are folded into, of one process; `seal` turns it into a state.

    An engine pulls the items of a store through it, a dump pushes the batches of a model into it;
    either saves `arrays` from time to time, and goes on from them by `restore`. States of different
    samples merge by their own ``merge``. `MomentsAccumulator` is one, `StateFold` all others.
    """

    def add(self, *block: Any, **options: Any) -> None:
        """Fold a block: its arrays, such as features (B, D) and labels (B,)."""
        ...

    def arrays(self) -> Arrays:
        """Return all that it is so far as arrays on the host; the next `add` may change them."""
        ...

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Go on from what `arrays` returned, to the same bits as without a break."""
        ...

    def seal(self) -> StateOut:
        """Return the state; the fold is spent."""
        ...


class StateFold(Generic[State]):
    """Merges the state of each block into one that is held on the host.

    Parameters
    ----------
    zero : State
        The state of nothing.
    state_of : callable
        ``state_of(*block)`` is the state of a block, on whatever device; None where nothing is
        added any more.
    """

    def __init__(self, zero: State, state_of: Callable[..., State] | None = None) -> None:
        self.state: Any = zero
        self._state_of = state_of

    def add(self, *block: Any) -> None:
        """Fold a block."""
        assert self._state_of is not None
        kind = type(self.state)
        self.state = self.state.merge(kind.from_arrays(self._state_of(*block).to_arrays()))

    def skip(self, n_rows: int) -> None:
        """Count rows that are left out."""
        self.state = replace(self.state, skipped=self.state.skipped + n_rows)

    def arrays(self) -> Arrays:
        """Return the state so far as arrays."""
        arrays: Arrays = self.state.to_arrays()
        return arrays

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Go on from what `arrays` returned."""
        self.state = type(self.state).from_arrays(arrays)

    def seal(self) -> State:
        """Return the state."""
        state: State = self.state
        return state


def detached(values: Array) -> Array:
    """Return a torch tensor without its history: a state would keep all it was computed from."""
    return values.detach() if is_torch_array(values) else values


def check_block(features: Array, labels: Array, n_classes: int) -> tuple[Array, Array]:
    """Check a block's shapes and labels, and drop the rows with labels below 0: no samples.

    Raises
    ------
    DataError
        When shapes, libraries or devices do not fit, or a label is not below `n_classes`; names
        the row.
    """
    if len(features.shape) != 2 or tuple(labels.shape) != (features.shape[0],):
        raise DataError(
            f"features {tuple(features.shape)} with labels {tuple(labels.shape)}",
            "features (N, D) with labels (N,)",
        )
    features = detached(features)
    xp = namespace(features, labels)
    if device(features) != device(labels):
        raise DataError(
            f"features on {device(features)} with labels on {device(labels)}", "one device"
        )
    labels = check_ids(labels, n_classes)
    samples = labels >= 0
    if bool(xp.all(samples)):
        return features, labels
    return features[samples], labels[samples]


def check_ids(ids: Array, n_classes: int, what: str = "label") -> Array:
    """Return class ids of any type, whole numbers below `n_classes`, as int64.

    Raises
    ------
    DataError
        Names the first that is none, and its row; `what` is what the message calls it.
    """
    xp = namespace(ids)
    if not xp.isdtype(ids.dtype, ("bool", "integral", "real floating")):
        raise DataError(f"{what}s of {ids.dtype}", "integers")
    if xp.isdtype(ids.dtype, "real floating"):
        # NaN differs from itself, and what is beyond the range of integers is no id.
        broken = (ids != xp.floor(ids)) | (xp.abs(ids) >= 2.0**62)
        _refuse_first(ids, broken, what, "integers")
    whole = xp.astype(ids, xp.int64, copy=False)
    beyond = whole >= n_classes
    if xp.isdtype(ids.dtype, "unsigned integer"):
        beyond = beyond | (whole < 0)  # 2^63 and more
    _refuse_first(ids, beyond, what, f"{what}s below {n_classes}, the classes")
    return whole


def _refuse_first(ids: Array, bad: Array, what: str, expected: str) -> None:
    xp = namespace(ids)
    if bool(xp.any(bad)):
        row = int(xp.argmax(xp.astype(bad, xp.int8)))
        kind = float if xp.isdtype(ids.dtype, "real floating") else int
        raise DataError(f"{what} {kind(ids[row])} in row {row}", expected)
