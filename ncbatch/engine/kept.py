"""Kept states: finished work in atomic files, keyed by what it was made from."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ncbatch.arrays.atomic import replacing
from ncbatch.arrays.named_arrays import Arrays
from ncbatch.errors import OutputError

# What a state was made from, flat. "state" and "place" say of what it is; "holds" lists parts, and
# a state that holds more serves as well; all else must be equal.
About: TypeAlias = Mapping[str, Any]

_ABOUT = "about.json"
_STATE = "state.npz"
_SUBJECT = ("state", "place", "class_block")


@dataclass(frozen=True)
class Kept:
    """The kept work of one pass: a folder of its own, named by a hash of `about`.

    Every file in it is complete or absent: it is written under another name, flushed and renamed.
    A file that cannot be read counts as absent.

    Attributes
    ----------
    root : Path
        The directory given with ``--state``.
    about : mapping of str to number, str or None
        What the state is of (``state`` and ``place``) and what it depends on.
    """

    root: Path
    about: About

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.root / f"{self.about['state']}-{digest(self.about)}"

    def load(self, name: str) -> Arrays | None:
        """Read what was saved under a name; None when it is missing or damaged."""
        try:
            path = self.folder / f"{name}.npz"
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def save(self, name: str, arrays: Arrays) -> None:
        """Keep arrays under a name.

        Raises
        ------
        OutputError
            When they cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / _ABOUT).exists():
                text = json.dumps(dict(self.about), indent=1, default=str)
                with replacing(self.folder / _ABOUT) as path:
                    path.write_text(text, encoding="utf-8")
            with replacing(self.folder / f"{name}.npz") as path, path.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
        except OSError as error:
            raise OutputError(
                f"work cannot be kept in '{self.root}': {error.strerror or error}",
                "a directory with room to write to",
            ) from error

    def conclude(self, arrays: Arrays) -> None:
        """Keep the finished state, and delete all that it replaces, left-overs of kills too."""
        self.save("state", arrays)
        needed = {a.tobytes().decode() for name, a in arrays.items() if name.endswith(".path")}
        for path in self.folder.iterdir():
            if path.name not in (_ABOUT, _STATE) and str(path) not in needed:
                path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Delete the finished state, which cannot be used."""
        (self.folder / _STATE).unlink(missing_ok=True)

    def changes(self) -> str | None:
        """Say why earlier work on the same subject does not serve; None when there is none.

        Returns
        -------
        str or None
            Such as ``"precision was exact, is fp32"``.
        """
        reasons = (
            _difference(about, self.about)
            for about in _all(self.root)
            if all(about.get(name) == self.about.get(name) for name in _SUBJECT)
        )
        return min(reasons, key=len, default=None)


def find_finished(root: Path, about: About) -> Kept | None:
    """Find a finished state that is, or holds, what `about` describes."""
    # Other folders are looked into only where the state itself is not there.
    others = _all(root) if "holds" in about else ()
    wider = (
        other
        for other in others
        if set(about["holds"]) <= set(other.get("holds", ()))
        and digest({**other, "holds": 0}) == digest({**about, "holds": 0})
    )
    states = (Kept(root, each) for each in chain([about], wider))
    return next((kept for kept in states if (kept.folder / _STATE).exists()), None)


def digest(about: About) -> str:
    """Hash what a state depends on, wherever it lies; 16 hexadecimal digits."""
    # Data that was moved is known by its fingerprint.
    rest = {name: value for name, value in about.items() if name != "place"}
    text = json.dumps(rest, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _all(root: Path) -> Iterator[About]:
    for path in sorted(root.glob(f"*/{_ABOUT}")):
        try:
            yield json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue


def _difference(earlier: About, now: About) -> str:
    names = [name for name in now if earlier.get(name) != now[name]]
    if any(name.endswith("fingerprint") for name in names):
        return "the stored data or the classes used changed"
    return "; ".join(f"{n.replace('_', ' ')} was {earlier.get(n)}, is {now[n]}" for n in names)
