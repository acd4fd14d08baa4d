"""The command line: arguments only. Commands import what they use, so that --help is quick."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import Any

import click

from ncbatch import __version__
from ncbatch.errors import NcbatchError, UsageError


class _Commands(click.Group):
    """Keeps commands in the order of use instead of the alphabet's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ncbatch")
def cli() -> None:
    """Measure neural collapse on stored features: out of core, exact, from one read.

    Import features into a store, add the classifier, then measure.
    """


def _apply_preset(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    if name is not None:
        from ncbatch.measurement import PRESETS

        ctx.default_map = {**(ctx.default_map or {}), **PRESETS[name]}


@cli.command("import")
@click.argument("store", type=click.Path())
@click.option("--split", required=True, help="Split that the rows go to, such as train.")
@click.option("--layer", required=True, help="Layer that they are features of.")
@click.option(
    "--features", required=True,
    help="(N, D): .npy, .npz:key or Zarr path, or a quoted glob of shards of them.",
)  # fmt: skip
@click.option("--labels", help="(N,) integers, likewise; negative: no sample.")
@click.option("--predictions", help="(N,) integers: the model's own decisions at this layer.")
@click.option(
    "--classes", "n_classes", type=click.IntRange(min=1),
    help="Number of classes K of a new store  [default: largest label + 1]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the layer if it is there.")
def import_(**arguments: Any) -> None:
    """Import features from files into STORE, made when it is not there."""
    from ncbatch.ingest import import_features
    from ncbatch.report import ProgressBar

    arguments["path"] = arguments.pop("store")
    done = import_features(**arguments, progress=ProgressBar())
    if len(done.features.shards) > 1:
        for shard in done.features.shards:
            click.echo(f"{shard.shape[0]:>12,} rows  {shard.path}")
    made = "created with" if done.created else "has"
    click.echo(
        f"{done.features.n_rows:,} rows of {done.features.row_shape[0]:,} features imported into "
        f"{arguments['path']}/{arguments['split']}/{arguments['layer']}; "
        f"the store {made} K = {done.n_classes:,} classes"
    )


@cli.command()
@click.argument("store", type=click.Path())
@click.option("--layer", required=True, help="Layer whose features the classifier reads.")
@click.option("--weight", required=True, help="(K, D) floats: .npy, .npz:key or Zarr path.")
@click.option("--bias", help="(K,) floats, likewise.")
@click.option(
    "--rows", type=click.IntRange(min=1), help="Keep the first K rows of a padded vocabulary."
)
def classifier(store: str, layer: str, weight: str, bias: str | None, rows: int | None) -> None:
    """Store the linear classifier that reads a layer."""
    from ncbatch.ingest import import_classifier

    shape = import_classifier(store, layer, weight, bias, rows)
    click.echo(f"classifier of {shape[0]:,} classes and {shape[1]:,} features stored for {layer}")


@cli.command()
@click.argument("store", type=click.Path())
@click.option("--split", required=True, help="Split whose writers have all ended.")
def finalize(store: str, split: str) -> None:
    """Complete a split of STORE that several writers wrote, once all have ended."""
    from ncbatch.store import FeatureStore

    done = FeatureStore.open(store).finalize(split)
    click.echo(f"split {split} of {store} is complete: {done.n_samples:,} samples")


@cli.command()
@click.argument("store", type=click.Path())
def info(store: str) -> None:
    """Show what is in STORE: splits, layers, sizes, classifiers."""
    from ncbatch.report import info_tables
    from ncbatch.store import FeatureStore

    _show(_console(), info_tables(FeatureStore.open(store)))


@cli.command()
@click.argument("store", type=click.Path())
def validate(store: str) -> None:
    """Read everything in STORE and name every bad chunk; exit code 1 if there is any."""
    from ncbatch.store import FeatureStore

    opened = FeatureStore.open(store)
    faults = opened.validate()
    for fault in faults:
        click.echo(str(fault))
    if faults:
        click.echo(f"{len(faults)} bad chunk{'s' if len(faults) > 1 else ''} in {store}")
        sys.exit(1)
    click.echo(f"{store} is valid: splits {', '.join(opened.splits) or 'none'}")


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


@cli.command()
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


@cli.command()
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
    console = _console()
    _show(console, report.result_tables(dataset, console.width))
    console.print(f"device: {dataset.attrs['device']}", markup=False, highlight=False)
    for line in report.notes(dataset):
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


@cli.command()
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


@cli.command()
def metrics() -> None:
    """List every metric: name, formula, what it reads, source."""
    from ncbatch.report import metric_table

    _show(_console(), [metric_table()])


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(
            f"--metrics '{text}'", "names, separated by commas", "see 'ncbatch metrics'"
        )
    return names


def _console() -> Any:
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # layer names may hold brackets and colons
    if not console.is_terminal:  # never cut a table there
        console.width = max(console.width, 1000)
    return console


def _show(console: Any, parts: list[Any]) -> None:
    for part in parts:
        console.print(part)


def main() -> None:
    """Run the command line; errors that users cause become one or two lines and exit code 1 or 2."""
    # A terminal may lack a letter; what stands in for one has no such method.
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    # As Ctrl-C does, so that a cancelled job leaves no files behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(cli(prog_name="ncbatch", standalone_mode=False) or 0)
    except NcbatchError as error:
        _fail(str(error), 1)
    except click.UsageError as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()
            sys.exit(error.exit_code)
        command = error.ctx.command_path if error.ctx else "ncbatch"
        _fail(f"{error.format_message()}\nsee '{command} --help'", error.exit_code)
    except click.Abort:
        _fail("interrupted", 130)
    except OSError as error:  # a full disk, a folder without permission
        _fail(f"{error.strerror or error}" + (f": '{f}'" if (f := error.filename) else ""), 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"ncbatch: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
