"""States as named arrays: to send them between processes, and to keep them in files."""

from __future__ import annotations

import os
import types
import typing
import zipfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from ncbatch.arrays import Array, to_numpy
from ncbatch.errors import DataError


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
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        marker: dict[str, Any] = {self._marker(): np.int64(1)}
        try:
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, **marker, **self.to_arrays())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

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
