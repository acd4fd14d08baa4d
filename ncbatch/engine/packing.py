"""Packing states into named arrays and back, without pickles."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ncbatch.arrays import Array, StoredRows, to_numpy

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


def pack(value: Any, name: str = "value") -> Arrays:
    """Take a state apart into arrays.

    Parameters
    ----------
    value : dataclass, array, StoredRows, number or None
        Dataclasses may hold all of these.
    name : str, optional
        What the names of the arrays begin with.

    Examples
    --------
    >>> sorted(pack({"a": 1, "b": None}, "state"))
    ['state.a']
    """
    if value is None:
        return {}
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {
            key: array for n, v in value.items() for key, array in pack(v, f"{name}.{n}").items()
        }
    if isinstance(value, StoredRows):
        place = np.frombuffer(str(value.path).encode(), np.uint8)
        return {f"{name}.path": place, f"{name}.shape": np.array(value.shape, np.int64)}
    return {name: to_numpy(value) if hasattr(value, "shape") else np.asarray(value)}


def unpack(
    kind: Any,
    arrays: Mapping[str, npt.NDArray[Any]],
    name: str = "value",
    put: Callable[[npt.NDArray[Any]], Array] = lambda array: array,
) -> Any:
    """Put a state of type `kind` together again; the inverse of `pack`.

    Parameters
    ----------
    kind : type
        A dataclass, array type, number type, or one of those ``| None``.
    arrays : mapping of str to array
        What `pack` gave.
    name : str, optional
        As given to `pack`.
    put : callable, optional
        Brings an array to the device that the state shall be on.

    Raises
    ------
    KeyError
        When an array is missing.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if not any(key == name or key.startswith(name + ".") for key in arrays):
            return None
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind(
            **{
                field: unpack(hint, arrays, f"{name}.{field}", put)
                for field, hint in _hints(kind).items()
            }
        )
    if f"{name}.path" in arrays:
        shape = tuple(int(n) for n in arrays[f"{name}.shape"])
        return _stored_rows(arrays[f"{name}.path"].tobytes().decode(), shape)
    if kind in (int, float, bool):
        return kind(arrays[name][()])
    return put(arrays[name])


def _stored_rows(path: str, shape: tuple[int, ...]) -> StoredRows:
    rows = StoredRows(path, (shape[0], shape[1]))
    if not rows.complete:
        raise KeyError(path)
    return rows


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
