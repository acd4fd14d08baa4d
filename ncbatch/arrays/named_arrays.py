"""States as named arrays: to send them between processes, and to keep them in files."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.atomic import replacing
from ncbatch.arrays.namespace import Array, to_numpy
from ncbatch.arrays.rows import StoredRows
from ncbatch.errors import DataError

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


def pack(value: Any, name: str = "value", *, host: bool = True) -> Arrays:
    """Take a state apart into arrays, without pickles.

    Parameters
    ----------
    value : dataclass, mapping, array, StoredRows, number or None
        Dataclasses may hold all of these.
    name : str, optional
        What the names of the arrays begin with.
    host : bool, optional
        Whether arrays of a device are copied to NumPy; otherwise they are left as they are.

    Examples
    --------
    >>> sorted(pack({"a": 1, "b": None}, "state"))
    ['state.a']
    """
    if value is None:
        return {}
    if dataclasses.is_dataclass(value):
        value = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if not (field.name in _later(value) and getattr(value, field.name) == field.default)
        }
    if isinstance(value, Mapping):
        parts = (pack(part, _joined(name, key), host=host) for key, part in value.items())
        return {key: array for part in parts for key, array in part.items()}
    if isinstance(value, StoredRows):
        path = np.frombuffer(str(value.path).encode(), np.uint8)
        return {f"{name}.path": path, f"{name}.shape": np.array(value.shape, np.int64)}
    if not host and getattr(value, "shape", ()) != ():
        return {name: value}
    return {name: np.asarray(to_numpy(value))}


def unpack(
    kind: Any,
    arrays: Mapping[str, Array],
    name: str = "value",
    put: Callable[[Array], Array] = lambda array: array,
) -> Any:
    """Put a state of type `kind` together again; the inverse of `pack`.

    Parameters
    ----------
    kind : type
        A dataclass, array type, number type, or one of those ``| None``.
    arrays : mapping of str to array
        From `pack`.
    name : str, optional
        As given to `pack`.
    put : callable, optional
        Brings an array to the device that the state shall be on.

    Raises
    ------
    DataError
        When an array is missing, or the file of one.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if not _holds(arrays, name):
            return None
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        names = {field: _joined(name, field) for field in _hints(kind)}
        return kind(
            **{
                field: unpack(hint, arrays, names[field], put)
                for field, hint in _hints(kind).items()
                if field not in _later(kind) or _holds(arrays, names[field])
            }
        )
    if f"{name}.path" in arrays:
        shape = tuple(int(n) for n in arrays[f"{name}.shape"])
        rows = StoredRows(arrays[f"{name}.path"].tobytes().decode(), (shape[0], shape[1]))
        if not rows.complete:
            raise DataError(f"no rows {shape} in '{rows.path}'", "the file that a state names")
        return rows
    if name not in arrays:
        raise DataError(
            f"no array '{name}' of a state", f"arrays {', '.join(sorted(arrays))}, and it"
        )
    if kind in (int, float, bool):
        return kind(arrays[name])
    return put(arrays[name])


def _holds(arrays: Mapping[str, Array], name: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for key in arrays)


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _later(state: Any) -> frozenset[str]:
    return getattr(state, "later", frozenset())


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
    later : frozenset of str
        Numbers that states of earlier versions lack; they are left out where they are the default.
    """

    called: ClassVar[str]
    later: ClassVar[frozenset[str]] = frozenset()

    def to_arrays(self, *, host: bool = True) -> dict[str, Array]:
        """Return the state as named arrays, to be sent to another process or stored.

        Parameters
        ----------
        host : bool, optional
            Whether arrays of a device are copied to NumPy; otherwise they are returned as they
            are, not copied.

        Returns
        -------
        dict of str to array
            What `from_arrays` takes; numbers are NumPy arrays of no dimension.
        """
        return pack(self, "", host=host)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Make the state from what `to_arrays` returned, in their library and on their device.

        Raises
        ------
        DataError
            When an array is missing, or one has another name.
        """
        state: Self = unpack(cls, arrays, "")
        # A name too many is the array of another state, or a misspelt one.
        unknown = set(arrays) - set(pack(state, "", host=False)) - cls.later
        if unknown:
            raise DataError(
                f"arrays {', '.join(sorted(unknown))}", f"those that {cls.__name__}.to_arrays gives"
            )
        return state

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
        where = os.fspath(path)
        marker = cls._marker()
        refused = DataError(
            f"'{where}' holds no {cls.called}", f"a file written by {cls.__name__}.save"
        )
        try:
            # A pickle could run anything: files may come from strangers.
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
