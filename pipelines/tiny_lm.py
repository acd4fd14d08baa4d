"""Watch neural collapse in a small language model, dumped while it learns to write Python.

    python pipelines/tiny_lm.py [--out tiny-lm-run] [--quick]

Needs the extra ``demo`` (``pip install 'ncbatch[demo]'``), some minutes of two CPU cores and about
2 GB of disk. The text ships with Python: the standard library's sources, every tenth file kept for
testing; out of distribution is English prose, the help topics of ``pydoc``. A byte-pair tokenizer
and a GPT-NeoX model are trained on it; classes are the next token. Leaves in OUT:

- ``text/``: the documents as JSON lines, ``train``, ``test`` and ``ood``;
- ``checkpoints/step-000000/``, ...: the model and its tokenizer, as transformers saves them;
- ``stores/step-000000.zarr``, ...: features of every layer, a store per checkpoint;
- ``results.zarr``, ``results.csv``: what was measured; ``state/``: what a new sweep need not read;
- ``depth.png``, ``training.png``: metrics over depth and over training, with their yardsticks.

The same command goes on after an interruption; what exists is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from plots import depth_tables, in_order, only, plot_over_depth, plot_over_training
from rich.console import Console
from rich.table import Table
from tiny_gpt import (
    QUICK,
    Recipe,
    documents,
    load_model,
    make_tokenizer,
    train,
    write_file,
    write_texts,
)
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import logging

import ncbatch as nc

ROUNDS = 3  # of timing
HEAD_METRICS = ("nc3_dual_err", "nc4_agree", "nc4_clf_accuracy")
METRICS = (
    *("nc1_pinv", "nc1_cdnv", "nc2_etf_err", "nc2_cos_std", "nc2_norm_cv", "nc5_ood_dev"),
    *HEAD_METRICS,
)


def main() -> None:
    """Train, dump, measure once, show."""
    parser = argparse.ArgumentParser(description="neural collapse in a small language model")
    parser.add_argument("--out", type=Path, default=Path("tiny-lm-run"))
    parser.add_argument(
        "--quick", action="store_true", help="a toy of a few seconds, for the tests"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    out, recipe = options.out, QUICK if options.quick else Recipe()
    console = Console(soft_wrap=True)
    keep_recipe(recipe, out)

    texts = write_texts(recipe, out / "text")
    tokenizer = make_tokenizer(recipe, texts["train"], out / "tokenizer")
    checkpoints = train(recipe, texts, tokenizer, out / "checkpoints")
    stores = [
        dump_checkpoint(recipe, path, step, texts, out / "stores" / f"{path.name}.zarr")
        for step, path in checkpoints.items()
    ]
    measure_speed(recipe, checkpoints[recipe.steps], tokenizer, texts["train"], out)
    results = sweep(stores, out)
    for ending in (".zarr", ".csv"):
        nc.save_results(results, out / f"results{ending}")
    title = f"A GPT-NeoX model of {recipe.n_blocks} blocks on Python's sources"
    plot_over_depth(results, METRICS, f"{title}, over depth", out / "depth.png")
    plot_over_training(results, METRICS, f"{title}, over training", out / "training.png")

    for line in nc.notes(only(results, METRICS)):
        console.print(line)
    console.print(loss_table(checkpoints, results), speed_table(out))
    for table in depth_tables(results.isel(store=-1), METRICS):
        console.print(table)


def keep_recipe(recipe: Recipe, out: Path) -> None:
    """Record the recipe of a run; a folder of another one is not mixed with it."""
    path = out / "recipe.json"
    if path.exists() and json.loads(path.read_text("utf-8")) != asdict(recipe):
        raise SystemExit(f"{out} holds a run of another recipe: choose another --out")
    write_file(path, json.dumps(asdict(recipe), indent=1) + "\n")


def dump_checkpoint(
    recipe: Recipe,
    checkpoint: Path,
    step: int,
    texts: dict[str, Path],
    store: Path,
) -> Path:
    """Store the features of every layer and split; what is there is left as it is."""
    store.parent.mkdir(exist_ok=True)
    for split, text in texts.items():
        most = recipe.train_tokens if split == "train" else recipe.other_tokens
        nc.dump_language_model(
            checkpoint,
            text,
            store,
            split,
            max_tokens=most,
            context=recipe.context,
            batch_size=recipe.dump_batch,
            name="tiny-lm",
            step=step,
            device="cpu",
            resume=True,
        )
    print(f"dumped {store}")
    return store


def measure_speed(
    recipe: Recipe, checkpoint: Path, tokenizer: PreTrainedTokenizerFast, text: Path, out: Path
) -> None:
    """Time dumps against forward passes over the same batches, by turns, unless done before."""
    timings = read_timings(out)
    if "dump" in timings:
        return
    model = load_model(checkpoint).eval()
    throwaway = out / "stores" / "speed.zarr"

    def tokenize() -> list[BatchEncoding]:
        return list(batches_of(recipe, tokenizer, text))

    batches = tokenize()
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(**batch, use_cache=False)

    def dump() -> None:
        nc.dump_language_model(
            model,
            text,
            throwaway,
            "train",
            tokenizer=tokenizer,
            batch_size=recipe.dump_batch,
            context=recipe.context,
            max_tokens=recipe.train_tokens,
            overwrite=throwaway.exists(),
        )

    forward()  # the first is slower: memory is new
    works = {"tokenize": tokenize, "forward": forward, "dump": dump}
    taken = [[seconds(work) for work in works.values()] for _ in range(ROUNDS)]
    shutil.rmtree(throwaway)
    medians = dict(zip(works, np.median(taken, axis=0).tolist(), strict=True))
    keep_timings(out, timings | medians | {"tokens": n_tokens})


def batches_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, text: Path
) -> Iterator[BatchEncoding]:
    """Cut documents into the windows that a dump runs: until there are so many next tokens."""
    windows: list[list[int]] = []
    missing = recipe.train_tokens
    for ids in tokenizer(documents(text), verbose=False)["input_ids"]:
        # The last token of a document has no next one.
        for start in range(0, len(ids) - 1, recipe.context):
            if missing > 0:
                windows.append(ids[start : start + recipe.context])
                missing -= min(recipe.context, len(ids) - 1 - start)
    for first in range(0, len(windows), recipe.dump_batch):
        part = windows[first : first + recipe.dump_batch]
        yield tokenizer.pad({"input_ids": part}, padding_side="right", return_tensors="pt")


def seconds(work: Callable[[], object]) -> float:
    """Time a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_timings(out: Path) -> dict[str, float]:
    """Read what was timed in this run's folder."""
    path = out / "timings.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def keep_timings(out: Path, timings: dict[str, float]) -> None:
    """Write what was timed."""
    write_file(out / "timings.json", json.dumps(timings) + "\n")


def sweep(stores: list[Path], out: Path) -> xr.Dataset:
    """Measure all layers of all stores in one graph; states that were kept are not read again."""
    state = out / "state"
    first = not state.exists()
    start = time.perf_counter()
    results = nc.measure(stores, null=True, state=state)
    if first:
        keep_timings(out, read_timings(out) | {"sweep": time.perf_counter() - start})
    return results


def loss_table(checkpoints: dict[int, Path], results: xr.Dataset) -> Table:
    """Lay out losses by step, with what the head's input says at each."""
    head = in_order(results.isel(store=-1))[-1]
    table = Table(
        title="over training: losses in nats per token, metrics of what the head sees",
        title_justify="left",
    )
    for name in ("step", "train loss", "test loss", *HEAD_METRICS):
        table.add_column(name, justify="right", no_wrap=True)
    for number, (step, path) in enumerate(checkpoints.items()):
        losses = json.loads((path / "losses.json").read_text("utf-8"))
        values = results.isel(store=number).sel(layer=head)
        cells = (f"{float(values[name]):.3g}" for name in HEAD_METRICS)
        table.add_row(f"{step:,}", f"{losses['train']:.3f}", f"{losses['test']:.3f}", *cells)
    return table


def speed_table(out: Path) -> Table:
    """Lay out what was timed."""
    timings = read_timings(out)
    tokens, bare, dumped = (timings[name] for name in ("tokens", "forward", "dump"))
    without = dumped - timings["tokenize"]
    title = f"speed, medians of {ROUNDS} rounds"
    table = Table("what", "time", "tokens/s", title=title, title_justify="left")
    table.add_row("bare forward pass", f"{bare:.2f} s", f"{tokens / bare:,.0f}")
    table.add_row("reading and tokenising the text", f"{timings['tokenize']:.2f} s", "")
    table.add_row("dump of all layers, both included", f"{dumped:.2f} s", f"{tokens / dumped:,.0f}")
    table.add_row("dump over forward pass", f"{dumped / bare:.2f} x", "")
    table.add_row("the same without tokenising", f"{without / bare:.2f} x", "")
    if "sweep" in timings:
        table.add_row("sweep of all stores, in one graph", f"{timings['sweep']:.1f} s", "")
    return table


if __name__ == "__main__":
    main()
