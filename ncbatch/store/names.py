"""Names in the order in which a person counts them."""

from __future__ import annotations

import re


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Give the key that sorts names by the numbers in them.

    Examples
    --------
    >>> sorted(["h.10", "h.2"], key=natural_key)
    ['h.2', 'h.10']
    """
    parts = re.split(r"(\d+)", name)
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in parts]
