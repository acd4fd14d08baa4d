"""States as named arrays: to send them between processes, and to keep them in files."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.atomic import replacing
from ncbatch.arrays.namespace import Array, to_numpy
from ncbatch.arrays.rows import StoredRows
from ncbatch.errors import DataError

# Packing states into named arrays and back, without pickles.


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


class NamedArrays:
    """What states share that are dataclasses of arrays, numbers and such dataclasses.

    Attributes
    ----------
    called : str
        What the state is called, in messages and in its files.
    """

    called: ClassVar[str]

    def to_arrays(self, *, host: bool = True) -> dict[str, Array]:
        """Give the state as named arrays, to be sent to another process or stored.

        Parameters
        ----------
        host : bool, optional
            Whether arrays of a device are copied to NumPy; otherwise they are given as they are,
            not copied.

        Returns
        -------
        dict of str to array
            What `from_arrays` takes; numbers are NumPy arrays of no dimension.
        """
        return _taken_apart(self, host)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Make the state from what `to_arrays` gave; arrays stay in their library, on their device.

        Raises
        ------
        DataError
            When an array is missing, or one has another name.
        """
        names = set(arrays)
        made: Self = _put_together(cls, arrays, "", names)
        if names:
            raise DataError(
                f"arrays {', '.join(sorted(names))}", f"those that {cls.__name__}.to_arrays gives"
            )
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one ``.npz`` file, complete or not at all."""
        marker: dict[str, Any] = {self._marker(): np.int64(1)}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **marker, **self.to_arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a state that `save` wrote, as NumPy arrays.

        Raises
        ------
        DataError
            When the file holds no such state.
        """
        where, marker = os.fspath(path), cls._marker()
        refused = DataError(
            f"'{where}' holds no {cls.called}", f"a file written by {cls.__name__}.save"
        )
        try:
            opened = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise refused from error
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise refused
        with opened as file:
            if marker not in file.files:
                raise refused
            try:
                arrays = {name: file[name] for name in file.files if name != marker}
            except (ValueError, EOFError, zipfile.BadZipFile) as error:
                raise DataError(f"'{where}' is damaged", "an intact file") from error
        return cls.from_arrays(arrays)

    @classmethod
    def _marker(cls) -> str:
        return f"ncbatch_{cls.called.replace(' ', '_')}"


def _taken_apart(value: Any, host: bool, name: str = "") -> dict[str, Array]:
    if value is None:
        return {}
    if is_dataclass(value):
        start = f"{name}." if name else ""
        return {
            key: array
            for f in fields(value)
            for key, array in _taken_apart(getattr(value, f.name), host, start + f.name).items()
        }
    if hasattr(value, "shape") and value.shape != ():
        return {name: to_numpy(value) if host else value}
    return {name: np.asarray(to_numpy(value) if hasattr(value, "shape") else value)}


def _put_together(kind: Any, arrays: Mapping[str, Array], name: str, left: set[str]) -> Any:
    """Make what has type `kind`; the names used are taken out of `left`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if not any(key == name or key.startswith(f"{name}.") for key in arrays):
            return None
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if is_dataclass(kind):
        hints, start = typing.get_type_hints(kind), f"{name}." if name else ""
        made: Any = kind
        return made(
            **{
                f.name: _put_together(hints[f.name], arrays, start + f.name, left)
                for f in fields(kind)
            }
        )
    if name not in arrays:
        raise DataError(
            f"no array '{name}' of a state", f"arrays {', '.join(sorted(arrays))}, and it"
        )
    left.discard(name)
    return kind(arrays[name]) if kind in (int, float) else arrays[name]
