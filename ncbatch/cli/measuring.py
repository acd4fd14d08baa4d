"""Commands that measure stores, and the options that they share."""

from __future__ import annotations

from typing import Any

import click

from ncbatch.cli.showing import open_console, show
from ncbatch.errors import UsageError


def _apply_preset(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    if name is not None:
        from ncbatch.measurement import PRESETS

        ctx.default_map = {**(ctx.default_map or {}), **PRESETS[name]}


_MEASURING = (
    click.argument("stores", nargs=-1, required=True, type=click.Path(), metavar="STORE..."),
    click.option(
        "--layer", "layers", multiple=True, help="Layer to measure; repeatable  [default: all]"
    ),
    click.option("--train", default="train", show_default=True, help="Split of the class means."),
    click.option("--test", help="Split that NC4 is measured on  [default: test, if there is one]"),
    click.option("--ood", help="Split of outside data for NC5  [default: ood, if there is one]"),
    click.option("--metrics", help="Names, separated by commas  [default: all that apply]"),
    click.option(
        "--min-count", type=click.IntRange(min=1), default=1, show_default=True,
        help="Only classes with at least so many samples.",
    ),
    click.option(
        "--max-count", type=click.IntRange(min=1),
        help="Only classes with at most so many samples.",
    ),
    click.option(
        "--classes", type=click.Path(),
        help="Only the classes in this file: ids, one per line, or .npy.",
    ),
    click.option(
        "--weighted", is_flag=True, help="Take m_G as the mean of samples, not of class means."
    ),
    click.option(
        "--dist-exp", type=float, default=1.0, show_default=True, help="Exponent p of the CDNV."
    ),
    click.option("--skip-nonfinite", is_flag=True, help="Leave out rows with NaN or infinities."),
    click.option(
        "--precision", type=click.Choice(["exact", "fp32", "tf32"]), default="exact",
        show_default=True,
        help="Float64 products, or float32 (on a GPU also TF32) ones for traces good to 1e-6.",
    ),
    click.option(
        "--null", is_flag=True,
        help="Measure NC1, NC2 and spectra for labels at random too, in the same read.",
    ),
    click.option(
        "--null-seed", type=int, default=0, show_default=True, help="Which draw of those."
    ),
    click.option("--per-class", is_flag=True, help="Save results per class too (.zarr, .nc)."),
    click.option(
        "--ncc", type=click.Choice(["exact", "faiss"]), default="exact", show_default=True,
        help="Who seeks the nearest class mean; the decisions are the same.",
    ),
    click.option(
        "--preset", type=click.Choice(["papyan2020", "wu2024"]), is_eager=True, expose_value=False,
        callback=_apply_preset, help="Conventions of a paper, as defaults of the options above.",
    ),
    click.option(
        "--memory",
        help="Ceiling of resident memory of each worker, such as 8GiB  [default: what is free]",
    ),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="Where to compute; auto takes the GPU when CuPy and one work.",
    ),
    click.option(
        "--cluster", default="sync", show_default=True, metavar="CLUSTER",
        help="sync, threads, processes, cuda (or processes:4), a scheduler's tcp:// or tls:// address, or its file.",
    ),
)  # fmt: skip


def _measuring(command: Any) -> Any:
    """Give a command the options of a measurement."""
    for option in reversed(_MEASURING):
        command = option(command)
    return command


def _arguments(metrics: str | None, classes: str | None, layers: tuple[str, ...]) -> dict[str, Any]:
    from ncbatch.ingest import read_classes

    return {
        "layers": layers or None,
        "metrics": None if metrics is None else _names(metrics),
        "classes": None if classes is None else read_classes(classes),
    }


@click.command()
@_measuring
def plan(
    stores: tuple[str, ...],
    layers: tuple[str, ...],
    metrics: str | None,
    classes: str | None,
    **options: Any,
) -> None:
    """Show what measuring STORE... would read, compute and need; runs nothing, reads no data."""
    from ncbatch.measurement import plan as make_plan

    click.echo(str(make_plan(stores, **_arguments(metrics, classes, layers), **options)))


@click.command()
@_measuring
@click.option(
    "--state", type=click.Path(),
    help="Keep finished work in this directory: the same command goes on after a crash.",
)  # fmt: skip
@click.option(
    "--out", "outs", multiple=True, type=click.Path(),
    help="Save as .zarr, .nc, .csv or .json, by ending; repeatable.",
)  # fmt: skip
def measure(
    stores: tuple[str, ...],
    layers: tuple[str, ...],
    metrics: str | None,
    classes: str | None,
    outs: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure neural collapse on the features in STORE..."""
    from ncbatch import report
    from ncbatch.measurement import measure
    from ncbatch.results import check_output, save_results

    for path in outs:
        check_output(path)
    dataset = measure(
        stores,
        **_arguments(metrics, classes, layers),
        progress=report.ProgressBar(),
        **options,
    )
    for path in outs:
        save_results(dataset, path)
    console = open_console()
    show(console, report.result_tables(dataset, console.width))
    console.print(f"device: {dataset.attrs['device']}", markup=False, highlight=False)
    for line in report.notes(dataset):
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


@click.command()
@click.argument("store", type=click.Path())
@click.option(
    "--kind", required=True,
    type=click.Choice(["cosine", "distance", "log", "riesz", "cdnv", "interference"]),
    help="What each pair of classes gets.",
)  # fmt: skip
@click.option("--layer", required=True, help="Layer of the class means.")
@click.option("--split", default="train", show_default=True, help="Split of the class means.")
@click.option("--weighted", is_flag=True, help="Take m_G as the mean of samples.")
@click.option("--dist-exp", type=float, default=1.0, show_default=True, help="Exponent of cdnv.")
@click.option("--out", required=True, type=click.Path(), help="A .zarr that does not exist yet.")
def grid(store: str, **options: Any) -> None:
    """Write a K x K array over pairs of classes, tile by tile, to a Zarr store.

    Only classes with samples take part; the array 'class' holds their ids.
    """
    from ncbatch.grid import write_grid
    from ncbatch.report import ProgressBar

    n = write_grid(store, **options, progress=ProgressBar())
    click.echo(f"{options['kind']} of {n:,} x {n:,} classes written to {options['out']}")


@click.command()
def metrics() -> None:
    """List every metric: name, formula, what it reads, source."""
    from ncbatch.report import metric_table

    show(open_console(), [metric_table()])


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(
            f"--metrics '{text}'", "names, separated by commas", "see 'ncbatch metrics'"
        )
    return names
