"""Commands that fill stores and look into them."""

from __future__ import annotations

import sys
from typing import Any

import click

from ncbatch.errors import UsageError, unknown_name
from ncbatch.results.tables import open_console, show

# The command that runs a language model and stores its hidden states.


_DUMPING = (
    click.argument("model"),
    click.argument("texts", nargs=-1, required=True, metavar="TEXT..."),
    click.option("--out", required=True, type=click.Path(), help="The store; made when it is not there."),
    click.option("--split", default="train", show_default=True, help="Split that the rows go to."),
    click.option(
        "--layer", "layers", multiple=True,
        help="Module to store, or MODULE:input for what it takes; repeatable  "
        "[default: the embeddings, every block, and what the head sees]",
    ),
    click.option(
        "--labels", type=click.Choice(["next", "given", "argmax"]),
        help="The class of a token: the next one of its document, its label in the text, or the "
        "model's own decision  [default: next; argmax for a masked model]",
    ),
    click.option(
        "--context", type=click.IntRange(min=2),
        help="Tokens of a window  [default: what the model takes, 2048 at most]",
    ),
    click.option(
        "--batch-size", type=click.IntRange(min=1), default=8, show_default=True,
        help="Windows of a forward pass.",
    ),
    click.option("--pack", is_flag=True, help="Fill windows with several documents."),
    click.option(
        "--field", default="text", show_default=True, help="Field of JSON lines and data sets."
    ),
    click.option("--exclude", help="Token ids that are no labels, separated by commas."),
    click.option("--max-tokens", type=click.IntRange(min=1), help="Only the first N samples."),
    click.option(
        "--per-class-cap", type=click.IntRange(min=1),
        help="Of every class only so many samples, drawn at random from all texts.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Which draw of those."
    ),
    click.option(
        "--dtype", type=click.Choice(["float16", "bfloat16", "float32"]),
        help="How rows are stored  [default: as the store has them; else bfloat16 for a model in bfloat16, float16 for others]",
    ),
    click.option(
        "--model-dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto", show_default=True, help="What the model runs in; auto: as it is stored.",
    ),
    click.option(
        "--device", default="auto", show_default=True,
        help="Where the model runs: auto, cpu, cuda or cuda:N; auto takes a GPU that torch finds.",
    ),
    click.option(
        "--rank", type=click.IntRange(min=0),
        help="Which of several processes this is  [default: RANK, as torchrun sets it, or 0]",
    ),
    click.option(
        "--world-size", type=click.IntRange(min=1),
        help="How many processes share the work  [default: WORLD_SIZE, or 1]",
    ),
    click.option(
        "--moments", is_flag=True,
        help="Keep no rows but their moments by class, which 'measure' takes as well.",
    ),
    click.option(
        "--means", metavar="SPLIT",
        help="With --moments: split whose class means decide, for NC4.",
    ),
    click.option("--name", help="What results call the model  [default: from its path]"),
    click.option("--step", type=click.IntRange(min=0), help="Its training step  [default: from path or revision]"),
    click.option("--revision", help="Branch, tag or commit on the hub."),
    click.option("--tokenizer", help="Another tokenizer than the model's own: folder or hub name."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    click.option("--allow-pickle", is_flag=True, help="Read pickled weights where there are no safetensors."),
    click.option("--resume", is_flag=True, help="Go on after an interruption, with the same options."),
    click.option("--overwrite", is_flag=True, help="Replace the split if it is there."),
)  # fmt: skip


def _dumping(command: Any) -> Any:
    for option in reversed(_DUMPING):
        command = option(command)
    return command


@click.command()
@_dumping
def dump(
    model: str,
    texts: tuple[str, ...],
    out: str,
    layers: tuple[str, ...],
    exclude: str | None,
    **options: Any,
) -> None:
    """Run MODEL over TEXT... once and store the hidden states of its layers.

    MODEL is a folder or a Hugging Face hub name of a causal or masked language model; TEXT... are
    text files, .jsonl files, or folders of the datasets library. The classes are the
    vocabulary; the head becomes the classifier of what it sees.
    """
    from ncbatch.ingest.language.dumps import dump_language_model
    from ncbatch.results.tables import ProgressBar, info_tables

    store = dump_language_model(
        model,
        texts,
        out,
        layers=layers or None,
        exclude=_ids(exclude),
        progress=ProgressBar(),
        **options,
    )
    show(open_console(), info_tables(store))


def _ids(text: str | None) -> list[int]:
    """Read token ids, separated by commas."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise UsageError(f"--exclude '{text}'", "token ids, separated by commas")
    return [int(part) for part in parts]


_SHARDS_SHOWN = 50


@click.command("import")
@click.argument("store", type=click.Path())
@click.option("--split", required=True, help="Split that the rows go to, such as train.")
@click.option(
    "--layer", required=True, multiple=True,
    help="Layer that they are features of; of several a pattern such as 'h.{}', or one each.",
)  # fmt: skip
@click.option(
    "--features", required=True,
    help="(N, D): .npy, .npz:key, .safetensors:key, .pt:key, .parquet:column, .arrow:column, "
    "datasets folder:column, .h5:dataset, Zarr path, .bin:dtype:width, .fbin, .fvecs, or a quoted "
    "glob of shards of them; '{}' in a key is the number of a layer.",
)  # fmt: skip
@click.option(
    "--labels",
    help="(N,) integers, likewise; negative: no sample; ':key': in the features' files. "
    "'next': the next of --tokens.",
)
@click.option("--predictions", help="(N,) integers: the model's own decisions at this layer.")
@click.option(
    "--axes", metavar="B,T,D",
    help="What the features' axes count: N samples, B sequences, T positions in order, L layers, D "
    "features  [default: N,D, or the one reading that fits the labels]",
)  # fmt: skip
@click.option(
    "--layer-index", type=click.IntRange(min=0), help="Take one layer of the axis L  [default: all]"
)
@click.option("--tokens", help="(N,) or (B, T) token ids, for --labels next.")
@click.option("--documents", help="Document ids: --labels next never crosses from one to another.")
@click.option("--mask", help="0 where a row is padding: no sample, and no next token.")
@click.option("--loss-mask", help="0 where a token (a label) does not count.")
@click.option(
    "--classes", "n_classes", type=click.IntRange(min=1),
    help="Number of classes K of a new store  [default: largest label + 1]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the layer if it is there.")
def import_(**arguments: Any) -> None:
    """Import features from files into STORE, made when it is not there.

    \b
    ncbatch import s.zarr --split train --layer fc --features x.npy --labels y.npy
    ncbatch import s.zarr --split train --layer 'h.{}' --axes T,L,D --classes 50257 \\
        --features 'req*.safetensors:hidden_states' --labels next --tokens :token_ids

    docs/import.md shows every format and shape.
    """  # noqa: D301  (click's own mark for lines that stay as they are)
    from ncbatch.ingest.files.imports import import_features
    from ncbatch.results.tables import ProgressBar

    arguments["path"] = arguments.pop("store")
    if len(arguments["layer"]) == 1:
        arguments["layer"] = arguments["layer"][0]
    done = import_features(**arguments, progress=ProgressBar())
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
        f"imported into {arguments['path']}/{arguments['split']}/{', '.join(done.layers)}; "
        f"the store {made} K = {done.n_classes:,} classes"
    )
    if done.n_samples < done.features.n_rows:
        click.echo(f"{done.n_samples:,} of {done.features.n_rows:,} rows are samples")


@click.command()
@click.argument("store", type=click.Path())
@click.option("--layer", required=True, help="Layer whose features the classifier reads.")
@click.option(
    "--weight", required=True,
    help="(K, D) floats in any form of 'import --features', such as "
    "model.safetensors:lm_head.weight.",
)  # fmt: skip
@click.option("--bias", help="(K,) floats, likewise.")
@click.option(
    "--rows", type=click.IntRange(min=1), help="Keep the first K rows of a padded vocabulary."
)
def classifier(store: str, layer: str, weight: str, bias: str | None, rows: int | None) -> None:
    """Store the linear classifier that reads a layer."""
    from ncbatch.ingest.files.imports import import_classifier

    shape = import_classifier(store, layer, weight, bias, rows)
    click.echo(f"classifier of {shape[0]:,} classes and {shape[1]:,} features stored for {layer}")


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


@click.command()
@click.argument("store", type=click.Path())
@click.option("--split", required=True, help="Split to delete, with all its layers and states.")
def delete(store: str, split: str) -> None:
    """Delete a split of STORE, complete or not, so that it can be written anew."""
    from ncbatch.store.feature_store import FeatureStore

    opened = FeatureStore.open(store)
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
    from ncbatch.store.feature_store import FeatureStore

    if model is None and step is None:
        raise UsageError("nothing to record", "--model NAME, --step N or both")
    opened = FeatureStore.open(store)
    opened.describe(model=model, step=step)
    said = [f"model {opened.model}"] if opened.model is not None else []
    said += [f"step {opened.step:,}"] if opened.step is not None else []
    click.echo(f"{store} is recorded as of {', '.join(said)}")


@click.command()
@click.argument("store", type=click.Path())
def info(store: str) -> None:
    """Show what is in STORE: splits, layers, sizes, classifiers."""
    from ncbatch.results.tables import info_tables
    from ncbatch.store.feature_store import FeatureStore

    show(open_console(), info_tables(FeatureStore.open(store)))


@click.command()
@click.argument("store", type=click.Path())
def validate(store: str) -> None:
    """Read everything in STORE and name every bad chunk; exit code 1 if there is any."""
    from ncbatch.store.feature_store import FeatureStore

    opened = FeatureStore.open(store)
    faults = opened.validate()
    for fault in faults:
        click.echo(str(fault))
    if faults:
        click.echo(f"{len(faults)} bad chunk{'s' if len(faults) > 1 else ''} in {store}")
        sys.exit(1)
    states = f", states of {', '.join(opened.state_splits)}" if opened.state_splits else ""
    click.echo(f"{store} is valid: splits {', '.join(opened.splits) or 'none'}{states}")
