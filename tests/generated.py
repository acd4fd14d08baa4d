"""Files that are made from declarations: ``python -m tests.generated`` writes them again.

The types of keyword arguments for type checkers (option_types.pyi), and docs/options.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from ncbatch.cli import cli
from ncbatch.engine.options import Declared, options_of
from ncbatch.ingest.language.options import DumpRequest
from ncbatch.measurement.options import MeasureRequest, PlanRequest, records

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


def options_page() -> str:
    """Write docs/options.md: every option of the commands that are made from declarations."""
    lines = [
        "# Options",
        "",
        "Made from the declarations by `python -m tests.generated`. The same names with underscores are "
        "keyword arguments in Python,",
        "where `help(nc.measure)` says the same. What values depend on is an attribute of results.",
    ]
    recorded = records()
    for name, function in _FUNCTIONS.items():
        command = cli.commands[name]
        lines += ["", f"## `ncbatch {name}`", "", f"In Python `{function}`.", ""]
        lines += ["| option | what it does | default | in results |", "|---|---|---|---|"]
        # Below the group: a command keeps the first help option that it makes, which has its names.
        context = click.Context(command, parent=click.Context(cli, **cli.context_settings))
        for parameter in command.get_params(context):
            if not isinstance(parameter, click.Option) or "--help" in parameter.opts:
                continue
            record = recorded.get(parameter.name) if name == "measure" else None
            flags = "`, `".join([*parameter.opts, *parameter.secondary_opts])
            cells = [
                f"`{flags}`" + (" (must be given)" if parameter.required else ""),
                re.sub(r"[|<]", r"\\\g<0>", parameter.help),
                _default(parameter),
                f"`{record.name or parameter.name}`" if record else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_FUNCTIONS = {
    "measure": "nc.measure(stores, ...)`, and `nc.plan(stores, ...)` but for what keeps work",
    "dump": "nc.dump_language_model(model, texts, store, split, ...)",
    "import": "ncbatch.ingest.import_features(store, split, layer, features, ...)",
    "classifier": "ncbatch.ingest.import_classifier(store, layer, weight, bias)",
    "grid": "ncbatch.measurement.grid.write_grid(GridRequest(...))",
}


def _default(parameter: click.Option) -> str:
    if not parameter.show_default:
        return ""
    if parameter.secondary_opts:
        return f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    return f"`{parameter.default}`"


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
    "docs/options.md": options_page,
    "ncbatch/ingest/language/option_types.pyi": lambda: types_of(
        DumpRequest,
        imports=(
            "from collections.abc import Iterable, Sequence",
            "from typing import Any, Literal, TypedDict",
        ),
    ),
}


def main() -> None:
    """Write all of them."""
    for name, make in FILES.items():
        (ROOT / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
