"""Files that are made from declarations: ``python -m tests.generated`` writes them again.

The types of keyword arguments for type checkers (option_types.pyi), and docs/options.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ncbatch.engine.options import Declared, options_of
from ncbatch.measurement.options import MeasureRequest, PlanRequest

ROOT = Path(__file__).parents[1]


def types_of(*declarations: type[Declared], imports: tuple[str, ...]) -> str:
    """Write a TypedDict for every declaration: what ``**options`` of a function may hold."""
    lines = [
        f'"""What {" and ".join(d.__name__ for d in declarations)} may be made of. '
        'Made by ``python -m tests.generated``."""',
        "",
        *imports,
    ]
    for declaration in declarations:
        lines += [
            "",
            f"class {declaration.__name__.replace('Request', 'Options')}(TypedDict, total=False):",
        ]
        lines += [f"    {option.name}: {option.type_text}" for option in options_of(declaration)]
    return "\n".join(lines).replace("'", '"') + "\n"


FILES: Mapping[str, Callable[[], str]] = {
    "ncbatch/measurement/option_types.pyi": lambda: types_of(
        PlanRequest,
        MeasureRequest,
        imports=(
            "import os",
            "from collections.abc import Iterable",
            "from typing import Literal, TypedDict",
            "",
            "import xarray as xr",
            "from distributed import Client",
        ),
    ),
}


def main() -> None:
    """Write all of them."""
    for name, make in FILES.items():
        (ROOT / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
