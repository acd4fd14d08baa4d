"""Neural collapse over the layers of a language model you name, and over its checkpoints.

    python pipelines/hf_layerwise.py MODEL TEXT... [--test TEXT] [--ood TEXT] [--out DIR]
    python pipelines/hf_layerwise.py EleutherAI/pythia-70m train.jsonl --test test.jsonl \
        --revision step1000 --revision step143000 --max-tokens 200000

MODEL is a folder or a name on the Hugging Face hub; TEXT are text files, JSON lines or ``datasets``
folders. Needs the extras ``hf`` and ``report``. Hidden states of every layer go to a store per
model or revision, all are measured in one sweep, and OUT gets ``results.zarr``, ``results.csv``,
``depth.png`` and, where there are several training steps, ``training.png``. ``--moments`` keeps
class moments instead of hidden states, for those without the disk. The same command goes on after
an interruption.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr
from plots import depth_tables, only, plot_over_depth, plot_over_training
from rich.console import Console

import ncbatch as nc

METRICS = (
    *("nc1_pinv", "nc1_cdnv", "nc2_etf_err", "nc2_cos_std", "nc2_norm_cv", "nc5_ood_dev"),
    *("nc3_dual_err", "nc4_agree", "nc4_clf_accuracy"),
)


def main() -> None:
    """Dump, measure once, show."""
    options = parsed()
    texts = {"train": options.text, "test": options.test, "ood": options.ood}
    stores = []
    for model, revision in checkpoints(options):
        store = options.out / "stores" / store_name(model, revision)
        if store in stores:
            raise SystemExit(f"two models would go to {store}: rename a folder, or run them apart")
        stores.append(store)
    options.out.joinpath("stores").mkdir(parents=True, exist_ok=True)
    for (model, revision), store in zip(checkpoints(options), stores, strict=True):
        for split, files in texts.items():
            if files:
                dump(options, model, revision, files, split, store)
    results = nc.measure(
        stores, null=options.null, state=options.out / "state", progress=nc.ProgressBar()
    )
    for ending in (".zarr", ".csv"):
        nc.save_results(results, options.out / f"results{ending}")
    show(results, options)


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="neural collapse over a language model's layers")
    parser.add_argument("model", help="folder, or name on the Hugging Face hub")
    parser.add_argument("text", nargs="+", help="text of the train split: class means come from it")
    parser.add_argument("--test", action="append", help="text that NC4 is measured on")
    parser.add_argument("--ood", action="append", help="text out of distribution, for NC5")
    parser.add_argument(
        "--revision", action="append", default=[], help="of MODEL: branch, tag or commit"
    )
    parser.add_argument("--also", action="append", default=[], help="another model, or checkpoint")
    parser.add_argument("--out", type=Path, default=Path("layerwise-run"))
    parser.add_argument("--labels", choices=("next", "given", "argmax"), help="what classes are")
    parser.add_argument("--context", type=int, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per forward pass")
    parser.add_argument("--max-tokens", type=int, default=200_000, help="of each split")
    parser.add_argument("--moments", action="store_true", help="keep no hidden states")
    parser.add_argument("--null", action="store_true", help="labels at random beside")
    return parser.parse_args()


def checkpoints(options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """List models with their revisions, in the order named."""
    for revision in options.revision or [None]:
        yield options.model, revision
    for model in options.also:
        yield model, None


def store_name(model: str, revision: str | None) -> str:
    """Name a store by the last two parts of the model's path and the revision."""
    name = "-".join(Path(model).parts[-2:]) + (f"@{revision}" if revision else "")
    return re.sub(r"[^\w.@-]+", "-", name) + ".zarr"


def dump(
    options: argparse.Namespace,
    model: str,
    revision: str | None,
    texts: list[str],
    split: str,
    store: Path,
) -> None:
    """Store a split of every layer; the moments of other splits are decided by train's means."""
    means = "train" if options.moments and split == "test" else None
    print(f"{split} of {model} to {store}")
    nc.dump_language_model(
        model,
        texts,
        store,
        split,
        revision=revision,
        labels=options.labels,
        context=options.context,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        moments=options.moments,
        means=means,
        resume=True,
        progress=nc.ProgressBar(),
    )


def show(results: xr.Dataset, options: argparse.Namespace) -> None:
    """Print the tables and draw the figures."""
    console = Console(soft_wrap=True)
    for line in nc.notes(only(results, METRICS)):
        console.print(line, markup=False, highlight=False)
    for number in range(results.sizes["store"]):
        for table in depth_tables(results.isel(store=number), METRICS):
            console.print(table)
    name = "/".join(Path(options.model).parts[-2:])
    plot_over_depth(results, METRICS, f"{name}, over depth", options.out / "depth.png")
    steps = results["step"].values if "step" in results.coords else np.array([])
    if np.isfinite(steps).all() and len(np.unique(steps)) > 1:
        title = f"{name}, over training"
        plot_over_training(results, METRICS, title, options.out / "training.png")


if __name__ == "__main__":
    try:
        main()
    except nc.NcbatchError as error:
        raise SystemExit(f"error: {error}") from None
