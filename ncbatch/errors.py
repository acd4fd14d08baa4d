"""The errors a user can cause: each says what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self


class NcbatchError(Exception):
    """Base of every error that ncbatch raises on purpose.

    Parameters
    ----------
    found : str
        What is there.
    expected : str, optional
        What should have been there.
    remedy : str, optional
        What the user can do; printed on a second line.
    """

    def __init__(self, found: str, expected: str = "", remedy: str = "") -> None:
        super().__init__(found, expected, remedy)
        self.found = found
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        first = f"{self.found}; expected {self.expected}" if self.expected else self.found
        return f"{first}\n{self.remedy}" if self.remedy else first


class DataError(NcbatchError, ValueError):
    """Features, labels or classifiers that do not fit together or hold bad values."""


class UsageError(NcbatchError, ValueError):
    """An option or argument whose value makes no sense."""


class StoreError(NcbatchError, OSError):
    """A path that is no store, or a store that cannot be used as asked."""

    # OSError's own __str__ would print an errno.
    __str__ = NcbatchError.__str__


class CorruptionError(StoreError):
    """A stored chunk that is missing, cut short or altered."""


class BudgetError(NcbatchError, MemoryError):
    """A memory budget that cannot work."""

    def __new__(cls, *args: str, **named: str) -> Self:  # noqa: D102
        # MemoryError's own refuses a class of two bases, and Dask's unpickling calls it.
        return Exception.__new__(cls, *args)


class WorkerError(NcbatchError, RuntimeError):
    """Work that no worker of a cluster lives through, or a cluster that cannot be reached."""


class OutputError(NcbatchError, OSError):
    """A place that results cannot be written to."""

    __str__ = NcbatchError.__str__


class UnknownNameError(NcbatchError, LookupError):
    """A layer, split, metric or member that does not exist."""


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> UnknownNameError:
    """Make the error for a name that does not exist, with the nearest that does.

    Parameters
    ----------
    kind : str
        What is named: ``"layer"``, ``"split"``, ``"metric"``.
    name : str
        The name that was asked for.
    known : iterable of str
        The names that exist.
    where : str, optional
        Where it was looked for, such as a store's path.

    Returns
    -------
    UnknownNameError
        Ready to be raised.

    Examples
    --------
    >>> print(unknown_name("layer", "fc3", ["fc1", "fc2", "input"]))
    no layer 'fc3'; expected one of: fc1, fc2, input
    did you mean 'fc2'?
    """
    names = sorted(known)
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    missing = f"no {kind} '{name}'" + (f" in {where}" if where else "")
    expected = f"one of: {shown}" if names else ""
    if not names:
        missing += f" (there is no {kind} at all)"
    return UnknownNameError(missing, expected, f"did you mean '{near[0]}'?" if near else "")
