"""Files and folders that take their names when they are complete and on the disk."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield another path beside `path`, to write a file or a folder to.

    What was written takes the name `path`, and the place of what had it, when the ``with`` ends
    without an error; else it is deleted and `path` stays as it was. Two processes may write to one
    path at once: the last to end wins. An OSError is raised as it is.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield temporary
        if temporary.is_dir():
            take_name(temporary, target, temporary.with_suffix(".old"))
        else:
            # The bytes before the name: a machine that fails in between leaves no half file.
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def take_name(folder: Path, target: Path, aside: Path) -> None:
    """Rename a complete folder to `target`; what is there goes to `aside` first, then for good.

    A folder cannot be renamed over another, so for a moment neither has the name: after a kill in
    that moment `aside` holds the old one.
    """
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    folder.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
