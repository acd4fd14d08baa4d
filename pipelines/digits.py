"""Watch neural collapse happen: a small network on scikit-learn's digits, dumped while it trains.

    python pipelines/digits.py [--out digits-run] [--epochs 600]

Needs the extra ``demo`` (``pip install 'ncbatch[demo]'``) and about a minute of CPU. Leaves in OUT:
a store per checkpoint (``epoch-0000.zarr``, ...), the results (``results.zarr``, ``results.csv``)
and a figure (``collapse.png``). The digits' test set is their last 500 images; out of distribution
are grey patches of scikit-learn's two photographs.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from sklearn.datasets import load_digits, load_sample_images
from torch import nn

import ncbatch as nc

N_CLASSES = 10
N_TRAIN = 1297
N_PATCHES = 500
WIDTH = 256
BATCH = 163
LAYERS = {"input": "fc1:input", "hidden1": "act1", "hidden2": "act2", "hidden3": "act3"}
LAST = "hidden3"  # what the head reads: NC3 and NC4 exist there only
ALONG_DEPTH = ("nc1_pinv", "nc1_cdnv", "nc2_etf_err", "nc5_ood_dev")
AT_THE_HEAD = ("nc3_dual_err", "nc4_agree")
SHOWN = ALONG_DEPTH + AT_THE_HEAD

Split = tuple[torch.Tensor, torch.Tensor]


def load_splits(seed: int) -> dict[str, Split]:
    """Load inputs (N, 64) in [0, 1] and labels (N,) of train, test and ood."""
    digits = load_digits()
    X = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target, dtype=torch.long)
    rng = np.random.default_rng(seed)
    photographs = [image.mean(2) / 255 for image in load_sample_images().images]
    patches = []
    for _ in range(N_PATCHES):
        grey = photographs[rng.integers(len(photographs))]
        row, column = rng.integers(grey.shape[0] - 8), rng.integers(grey.shape[1] - 8)
        patches.append(grey[row : row + 8, column : column + 8].reshape(64))
    ood = torch.tensor(np.stack(patches), dtype=torch.float32)
    return {
        "train": (X[:N_TRAIN], y[:N_TRAIN]),
        "test": (X[N_TRAIN:], y[N_TRAIN:]),
        "ood": (ood, torch.zeros(N_PATCHES, dtype=torch.long)),
    }


def build_model() -> nn.Sequential:
    """Build 64-256-256-256-10 with batch norm and ReLU."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for number, width in enumerate((64, WIDTH, WIDTH), start=1):
        modules[f"fc{number}"] = nn.Linear(width, WIDTH)
        modules[f"norm{number}"] = nn.BatchNorm1d(WIDTH)
        modules[f"act{number}"] = nn.ReLU()
    modules["head"] = nn.Linear(WIDTH, N_CLASSES)
    return nn.Sequential(modules)


def train(model: nn.Module, data: Split, epochs: int) -> Iterator[int]:
    """Train far beyond zero error; yields the epoch before the first and after each."""
    X, y = data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    yield 0
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
        yield epoch


def dump_checkpoint(model: nn.Module, splits: dict[str, Split], path: Path) -> nc.FeatureStore:
    """Store the features of every layer and split."""
    store = nc.FeatureStore.create(path, N_CLASSES, overwrite=path.exists())
    for split, (X, y) in splits.items():
        batches = zip(X.split(BATCH), y.split(BATCH), strict=True)
        nc.dump(model, batches, store, split, LAYERS, dtype="float32")
    return store


def plot(results: xr.Dataset, epochs: list[int], path: Path) -> None:
    """Draw every metric over training at the last layer, and over depth at every checkpoint."""
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(19, 7.2), layout="constrained")
    colors = plt.get_cmap("viridis_r")(np.linspace(0.08, 1, len(epochs)))
    for (top, bottom), name in zip(axes.T, SHOWN, strict=True):
        top.plot(epochs, results[name].sel(layer=LAST), color="0.6", zorder=1)
        top.scatter(epochs, results[name].sel(layer=LAST), c=colors, zorder=2)
        top.set_xscale("symlog", linthresh=1)  # epoch 0 has a place, too
        top.xaxis.set_major_formatter(ScalarFormatter())
        top.set(xlabel="epoch", xlim=(-0.2, epochs[-1] * 1.5))
        top.set_title(name, fontweight="bold", pad=38)
        about = fill(results[name].attrs["long_name"], 30)
        top.text(0.5, 1.03, about, transform=top.transAxes, ha="center", fontsize=9.5)
        set_scale(top, name)
        if name in AT_THE_HEAD:
            bottom.axis("off")
            continue
        for epoch, color, line in zip(epochs, colors, results[name].values, strict=True):
            bottom.plot(list(LAYERS), line, "o-", color=color, label=f"{epoch}")
        bottom.set(xlabel="layer")
        set_scale(bottom, name)
    axes[0, 0].set_ylabel(f"over training, at {LAST}")
    axes[1, 0].set_ylabel("over depth, at every epoch shown")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    axes[1, -2].legend(handles, labels, title="epoch", loc="upper left", frameon=False)
    axes[1, -1].text(
        0,
        0.97,
        f"{' and '.join(AT_THE_HEAD)}\nneed a classifier: the head\nreads {LAST} only",
        va="top",
    )
    figure.suptitle("Neural collapse of a small network on scikit-learn's digits", fontsize=14)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def set_scale(axes: Axes, name: str) -> None:
    """NC1 falls by orders of magnitude; the others live on a linear scale from 0."""
    if name.startswith("nc1"):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)


def main() -> None:
    """Train, dump, measure once, show."""
    parser = argparse.ArgumentParser(description="neural collapse on scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path("digits-run"))
    parser.add_argument("--epochs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()

    torch.manual_seed(options.seed)
    splits = load_splits(options.seed)
    model = build_model()
    checkpoints = sorted({0, *np.geomspace(1, options.epochs, 7).round().astype(int).tolist()})
    stores = []
    for epoch in train(model, splits["train"], options.epochs):
        if epoch in checkpoints:
            path = options.out / f"epoch-{epoch:04d}.zarr"
            stores.append(dump_checkpoint(model, splits, path))
            console.print(f"epoch {epoch}: {path}")

    results = nc.measure(stores)
    for ending in (".zarr", ".csv"):
        nc.save_results(results, options.out / f"results{ending}")
    plot(results, checkpoints, options.out / "collapse.png")

    metrics = [name for name, value in results.items() if value.attrs.get("role") == "metric"]
    others = [name for name in metrics if name not in SHOWN]
    for table in nc.result_tables(results.drop_vars(others).isel(store=[-1])):
        console.print(table)
    for line in nc.notes(results):
        console.print(line)
    print(f"\n{LAST}, over training:")
    print(results[list(SHOWN)].sel(layer=LAST, drop=True).to_dataframe().to_string())


if __name__ == "__main__":
    main()
