"""Commands that fill stores and look into them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ncbatch.cli.options import DeclaredCommand
from ncbatch.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from ncbatch.store.feature_store import FeatureStore


@click.command(cls=DeclaredCommand, declares="ncbatch.ingest.language.options:DumpRequest")
@click.argument("model")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option(
    "--out", required=True, type=click.Path(), help="The store; made when it is not there."
)
@click.option("--split", default="train", show_default=True, help="Split that the rows go to.")
def dump(model: str, texts: tuple[str, ...], out: str, split: str, **options: Any) -> None:
    """Run MODEL over TEXT... once and store the hidden states of its layers.

    MODEL is a folder or a Hugging Face hub name of a causal or masked language model; TEXT... are
    text files, .jsonl files, or folders of the datasets library. The classes are the
    vocabulary; the head becomes the classifier of what it sees.
    """
    from ncbatch.ingest.language.dumps import dump_language_model
    from ncbatch.results.terminal import ProgressBar, info_tables, open_console, show

    store = dump_language_model(model, texts, out, split, progress=ProgressBar(), **options)
    show(open_console(), info_tables(store))


_SHARDS_SHOWN = 50


@click.command(
    "import", cls=DeclaredCommand, declares="ncbatch.ingest.files.imports:import_features"
)
@click.argument("path", type=click.Path(), metavar="STORE")
def import_(path: str, split: str, **options: Any) -> None:
    """Import features from files into STORE, made when it is not there.

    \b
    ncbatch import s.zarr --split train --layer fc --features x.npy --labels y.npy
    ncbatch import s.zarr --split train --layer 'h.{}' --axes T,L,D --classes 50257 \\
        --features 'req*.safetensors:hidden_states' --labels next --tokens :token_ids

    docs/import.md shows every format and shape.
    """  # noqa: D301  (click's own mark for lines that stay as they are)
    from ncbatch.ingest.files.imports import import_features
    from ncbatch.results.terminal import ProgressBar

    done = import_features(path, split, progress=ProgressBar(), **options)
    shards = done.features.shards
    if len(shards) > 1:
        for shard in shards[:_SHARDS_SHOWN]:
            click.echo(f"{shard.shape[0]:>12,} rows  {shard.path}")
        if len(shards) > _SHARDS_SHOWN:
            click.echo(f"{'...':>12}       {len(shards):,} in all, up to {shards[-1].path}")
    if done.axes != ("N", "D"):
        click.echo(f"axes of the features: {','.join(done.axes)}")
    made = "created with" if done.created else "has"
    several = f" of {len(done.layers)} layers" if len(done.layers) > 1 else ""
    click.echo(
        f"{done.features.n_rows:,} rows of {done.features.row_shape[-1]:,} features{several} "
        f"imported into {path}/{split}/{', '.join(done.layers)}; "
        f"the store {made} K = {done.n_classes:,} classes"
    )
    if done.n_samples < done.features.n_rows:
        click.echo(f"{done.n_samples:,} of {done.features.n_rows:,} rows are samples")


@click.command(cls=DeclaredCommand, declares="ncbatch.ingest.files.imports:import_classifier")
@click.argument("path", type=click.Path(), metavar="STORE")
def classifier(layer: str, **options: Any) -> None:
    """Store the linear classifier that reads a layer."""
    from ncbatch.ingest.files.imports import import_classifier

    k, d = import_classifier(layer=layer, **options)
    click.echo(f"classifier of {k:,} classes and {d:,} features stored for {layer}")


@click.command()
@click.argument("store", type=click.Path())
@click.option("--split", required=True, help="Split whose writers have all ended.")
def finalize(store: str, split: str) -> None:
    """Complete a split of STORE that several writers wrote, once all have ended.

    Their rows are completed, and the moments that they folded are merged.
    """
    from ncbatch.ingest.model.ranks import finalize as complete

    done = complete(store, split)
    if split in done.splits:
        n = done.split(split).n_samples
    else:
        layer, kind = done.state_kinds(split)[0]
        n = int(done.state_attributes(split, layer, kind).get("n_samples", 0))
    click.echo(f"split {split} of {store} is complete: {n:,} samples")


def _open(store: str) -> FeatureStore:
    from ncbatch.store.feature_store import FeatureStore

    return FeatureStore.open(store)


@click.command()
@click.argument("store", type=click.Path())
@click.option("--split", required=True, help="Split to delete, with all its layers and states.")
def delete(store: str, split: str) -> None:
    """Delete a split of STORE, complete or not, so that it can be written anew."""
    opened = _open(store)
    known = list(dict.fromkeys([*opened.splits, *opened.state_splits]))
    if split not in known and opened.layout(split) is None:
        raise unknown_name("split", split, known, store)
    opened.delete_split(split)
    click.echo(f"split {split} of {store} is deleted")


@click.command()
@click.argument("store", type=click.Path())
@click.option("--model", help="Name of the model that made the features.")
@click.option("--step", type=click.IntRange(min=0), help="Its training step.")
def describe(store: str, model: str | None, step: int | None) -> None:
    """Record in STORE which model and step its features are of; what is given replaces the old."""
    if model is None and step is None:
        raise UsageError("nothing to record", "--model NAME, --step N or both")
    opened = _open(store)
    opened.describe(model=model, step=step)
    records = [f"model {opened.model}"] if opened.model is not None else []
    records += [f"step {opened.step:,}"] if opened.step is not None else []
    click.echo(f"{store} is recorded as of {', '.join(records)}")


@click.command()
@click.argument("store", type=click.Path())
def info(store: str) -> None:
    """Show what is in STORE: splits, layers, sizes, classifiers."""
    from ncbatch.results.terminal import info_tables, open_console, show

    show(open_console(), info_tables(_open(store)))


@click.command()
@click.argument("store", type=click.Path())
def validate(store: str) -> None:
    """Read everything in STORE and name every bad chunk; exit code 1 if there is any."""
    opened = _open(store)
    faults = opened.validate()
    for fault in faults:
        click.echo(str(fault))
    if faults:
        click.echo(f"{len(faults)} bad chunk{'s' if len(faults) > 1 else ''} in {store}")
        sys.exit(1)
    states = f", states of {', '.join(opened.state_splits)}" if opened.state_splits else ""
    click.echo(f"{store} is valid: splits {', '.join(opened.splits) or 'none'}{states}")
