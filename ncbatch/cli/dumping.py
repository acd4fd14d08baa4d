"""The command that runs a language model and stores its hidden states."""

from __future__ import annotations

from typing import Any

import click

from ncbatch.cli.showing import open_console, show
from ncbatch.errors import UsageError

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
    from ncbatch.ingest import dump_language_model
    from ncbatch.listings import info_tables
    from ncbatch.report import ProgressBar

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
