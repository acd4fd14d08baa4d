"""Commands that fill stores and look into them."""

from __future__ import annotations

import sys
from typing import Any

import click

from ncbatch.cli.showing import open_console, show


@click.command("import")
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


@click.command()
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


@click.command()
@click.argument("store", type=click.Path())
@click.option("--split", required=True, help="Split whose writers have all ended.")
def finalize(store: str, split: str) -> None:
    """Complete a split of STORE that several writers wrote, once all have ended."""
    from ncbatch.store import FeatureStore

    done = FeatureStore.open(store).finalize(split)
    click.echo(f"split {split} of {store} is complete: {done.n_samples:,} samples")


@click.command()
@click.argument("store", type=click.Path())
def info(store: str) -> None:
    """Show what is in STORE: splits, layers, sizes, classifiers."""
    from ncbatch.report import info_tables
    from ncbatch.store import FeatureStore

    show(open_console(), info_tables(FeatureStore.open(store)))


@click.command()
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
