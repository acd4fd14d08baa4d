"""Commands that measure stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ncbatch.cli.options import DeclaredCommand
from ncbatch.errors import UsageError
from ncbatch.measurement.options import PRESETS


def _apply_preset(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    if name is not None:
        ctx.default_map = {**(ctx.default_map or {}), **PRESETS[name]}


def _read_classes(
    _: click.Context, __: click.Parameter, paths: tuple[str, ...]
) -> list[int] | None:
    if not paths:
        return None
    from ncbatch.ingest.files.imports import read_classes

    return [class_id for path in paths for class_id in read_classes(path)]


def _measuring(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what `plan` and `measure` take in another form than Python's functions."""
    for parameter in (
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            is_eager=True,
            expose_value=False,
            callback=_apply_preset,
            help="Conventions of a paper, as defaults of the options below.",
        ),
        click.option(
            "--classes",
            type=click.Path(),
            multiple=True,
            callback=_read_classes,
            help="Only the classes in this file: ids, one per line, or .npy; repeatable.",
        ),
        click.option(
            "--layer", "layers", multiple=True, help="Layer to measure; repeatable  [default: all]"
        ),
        click.argument("stores", nargs=-1, required=True, type=click.Path(), metavar="STORE..."),
    ):
        command = parameter(command)
    return command


def _ask(options: dict[str, Any]) -> dict[str, Any]:
    """Let a preset that decides on the samples of train follow --train, and no layer mean all."""
    source = click.get_current_context().get_parameter_source("test")
    if source is ParameterSource.DEFAULT_MAP and options["test"] == "train":
        options["test"] = options["train"]
    return {**options, "layers": options["layers"] or None}


@click.command(cls=DeclaredCommand, declares="ncbatch.measurement.options:PlanRequest")
@_measuring
def plan(stores: tuple[str, ...], **options: Any) -> None:
    """Show what measuring STORE... would read, compute and need; runs nothing, reads no data."""
    from ncbatch.measurement.run import plan

    click.echo(str(plan(stores, **_ask(options))))


@click.command(cls=DeclaredCommand, declares="ncbatch.measurement.options:MeasureRequest")
@_measuring
@click.option(
    "--out",
    "outs",
    multiple=True,
    type=click.Path(),
    help="Save as .zarr, .nc, .csv or .json, by ending; repeatable.",
)
@click.option(
    "--update",
    is_flag=True,
    help="Keep what --out (.zarr, .nc) holds and still fits the data; measure the rest.",
)
def measure(stores: tuple[str, ...], outs: tuple[str, ...], update: bool, **options: Any) -> None:
    """Measure neural collapse on the features in STORE..."""
    from ncbatch.measurement.run import measure
    from ncbatch.results.files import check_output, save_results
    from ncbatch.results.tables import collapse_lines, notes, result_tables
    from ncbatch.results.terminal import ProgressBar, open_console, show

    for path in outs:
        check_output(path)
    if outs and options["partial"] is None:
        options["partial"] = False
    earlier = _earlier(outs) if update else None
    dataset = measure(stores, update=earlier, progress=ProgressBar(), **_ask(options))
    for path in outs:
        save_results(dataset, path)
    console = open_console()
    show(console, result_tables(dataset, console.width))
    remarks = [f"note: {note}" for note in notes(dataset)]
    for line in (*collapse_lines(dataset), f"device: {dataset.attrs['device']}", *remarks):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _earlier(outs: tuple[str, ...]) -> str | None:
    """Find the results that are to be updated; None where none were saved yet."""
    kept = [path for path in outs if path.endswith((".zarr", ".nc"))]
    if not kept:
        raise UsageError(
            "--update without a .zarr or .nc to update",
            "an --out of such a name",
            "other kinds of files do not hold what an update needs",
        )
    return next((path for path in kept if Path(path).exists()), None)


@click.command(cls=DeclaredCommand, declares="ncbatch.measurement.grid:GridRequest")
@click.argument("path", type=click.Path(), metavar="STORE")
@click.option("--dry-run", is_flag=True, help="Show what it needs, and write nothing.")
def grid(dry_run: bool, **options: Any) -> None:
    """Write a K x K array over pairs of classes, tile by tile, to a Zarr store.

    Only classes with samples take part; the array 'class' holds their ids. What it needs is said
    first, and refused where memory or disk do not suffice.
    """
    from ncbatch.measurement.grid import GridRequest, write_grid
    from ncbatch.results.terminal import ProgressBar

    request = GridRequest(**options)
    plan = request.plan()
    click.echo(str(plan))
    request.check(plan)
    if not dry_run:
        n = write_grid(request, progress=ProgressBar())
        click.echo(f"{request.kind} of {n:,} x {n:,} classes written to {request.out}")


@click.command()
def metrics() -> None:
    """List every metric: name, formula, what it reads, source."""
    from rich.table import Table
    from rich.text import Text

    from ncbatch.metrics.catalogue import CATALOGUE
    from ncbatch.results.terminal import open_console

    table = Table("name", "what it is", "formula", "reads", "source")
    for metric in CATALOGUE.values():
        reads = ", ".join(sorted(metric.reads)) or "means"
        table.add_row(metric.name, metric.long_name, Text(metric.formula), reads, metric.source)
    open_console().print(table)
