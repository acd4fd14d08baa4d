"""How commands print."""

from __future__ import annotations

from typing import Any


def open_console() -> Any:
    """Open the console that tables are printed to."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # layer names may hold brackets and colons
    if not console.is_terminal:  # never cut a table there
        console.width = max(console.width, 1000)
    return console


def show(console: Any, parts: list[Any]) -> None:
    """Print tables and texts one after another."""
    for part in parts:
        console.print(part)
