"""Commands that measure stores, and the options that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ncbatch.errors import UsageError
from ncbatch.results.tables import open_console, show


def _apply_preset(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    if name is not None:
        from ncbatch.measurement.options import PRESETS

        ctx.default_map = {**(ctx.default_map or {}), **PRESETS[name]}


def _follow_train(ctx: click.Context, parameter: click.Parameter, split: str | None) -> str | None:
    """Let a preset that decides on the samples of train follow --train, which comes before."""
    source = ctx.get_parameter_source(str(parameter.name))
    if source is ParameterSource.DEFAULT_MAP and split == "train":
        return str(ctx.params["train"])
    return split


_MEASURING = (
    click.argument("stores", nargs=-1, required=True, type=click.Path(), metavar="STORE..."),
    click.option(
        "--layer", "layers", multiple=True, help="Layer to measure; repeatable  [default: all]"
    ),
    click.option("--train", default="train", show_default=True, help="Split of the class means."),
    click.option(
        "--test", callback=_follow_train,
        help="Split that NC4 is measured on  [default: test, if there is one]",
    ),
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
    click.option(
        "--ddof", type=click.IntRange(0, 1), default=0, show_default=True,
        help="V_c is divided by n_c - ddof, S_W by N - ddof K; with 1 a class of one sample has no V_c.",
    ),
    click.option(
        "--class-ddof", type=click.IntRange(0, 1), default=1, show_default=True,
        help="Variances over classes are divided by K - ddof.",
    ),
    click.option(
        "--divide-by-k/--no-divide-by-k", default=True, show_default=True,
        help="Divide nc1_pinv and nc1_svd by K.",
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
    from ncbatch.ingest.files.imports import read_classes

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
    from ncbatch.measurement.run import plan as make_plan

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
@click.option(
    "--update", is_flag=True,
    help="Keep what --out (.zarr, .nc) holds and still fits the data; measure the rest.",
)  # fmt: skip
@click.option(
    "--collapse-below", type=float, metavar="X",
    help="Collapse sets in at the first layer with nc1_cdnv under this  [default: 0.1 if --dist-exp is 1]",
)  # fmt: skip
def measure(
    stores: tuple[str, ...],
    layers: tuple[str, ...],
    metrics: str | None,
    classes: str | None,
    outs: tuple[str, ...],
    update: bool,
    **options: Any,
) -> None:
    """Measure neural collapse on the features in STORE..."""
    from ncbatch.measurement.run import measure
    from ncbatch.results import tables as comparing
    from ncbatch.results import tables as report
    from ncbatch.results.files import check_output, save_results

    for path in outs:
        check_output(path)
    dataset = measure(
        stores,
        **_arguments(metrics, classes, layers),
        update=_earlier(outs) if update else None,
        progress=report.ProgressBar(),
        **options,
    )
    for path in outs:
        save_results(dataset, path)
    console = open_console()
    show(console, report.result_tables(dataset, console.width))
    for line in comparing.collapse_lines(dataset):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
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
@click.option(
    "--ddof", type=click.IntRange(0, 1), default=0, show_default=True,
    help="V_c of cdnv is divided by n_c - ddof.",
)  # fmt: skip
@click.option("--out", required=True, type=click.Path(), help="A .zarr that does not exist yet.")
@click.option("--memory", help="Ceiling of resident memory, such as 8GiB  [default: what is free]")
@click.option("--dry-run", is_flag=True, help="Show what it needs, and write nothing.")
def grid(store: str, memory: str | None, dry_run: bool, **options: Any) -> None:
    """Write a K x K array over pairs of classes, tile by tile, to a Zarr store.

    Only classes with samples take part; the array 'class' holds their ids. What it needs is said
    first, and refused where memory or disk do not suffice.
    """
    from ncbatch.measurement.grid import GridRequest, write_grid
    from ncbatch.results.tables import ProgressBar

    request = GridRequest(store, **options)
    plan = request.plan(memory)
    click.echo(str(plan))
    request.check(plan)
    if dry_run:
        return
    n = write_grid(request, memory=memory, progress=ProgressBar())
    click.echo(f"{options['kind']} of {n:,} x {n:,} classes written to {options['out']}")


@click.command()
def metrics() -> None:
    """List every metric: name, formula, what it reads, source."""
    from ncbatch.results.tables import metric_table

    show(open_console(), [metric_table()])


def _earlier(outs: tuple[str, ...]) -> str | None:
    """Find the results that are to be updated; None where none were saved yet."""
    kept = [path for path in outs if path.endswith((".zarr", ".nc"))]
    if not kept:
        raise UsageError(
            "--update without a .zarr or .nc to update", "an --out of such a name",
            "other kinds of files do not hold what an update needs",
        )  # fmt: skip
    return next((path for path in kept if Path(path).exists()), None)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(
            f"--metrics '{text}'", "names, separated by commas", "see 'ncbatch metrics'"
        )
    return names
