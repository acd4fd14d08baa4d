"""Small models, batches for them, and what a dump of those must be."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

import ncbatch as nc

torch = pytest.importorskip("torch")
nn = torch.nn
torch.set_num_threads(1)  # models of a few neurons: threads would only wait for each other


SMALL_CHUNKS = 2**14  # 128 and 256 rows of the layers below, and the labels in blocks of 512


WIDE_LAYERS = {"h1": "act1", "in": "fc1:input", "last": "fc:input"}


K = 5


class Mlp(nn.Module):
    """Two hidden layers; the second activation works in place on what the layer gave."""

    def __init__(self, width: int = 16, n_classes: int = K) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, width)
        self.act1 = nn.ReLU()
        self.fc2 = nn.Linear(width, width)
        self.act2 = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, n_classes)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        x = self.act2(self.fc2(self.act1(self.fc1(x))))
        return self.fc(self.drop(self.norm(x)))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, K)

    def forward(self, x):
        return self.fc(self.pool(torch.relu(self.conv(x))).flatten(1))


@dataclasses.dataclass
class BlockOutput:
    hidden: torch.Tensor
    weights: torch.Tensor | None = None


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attend = nn.MultiheadAttention(12, 3, batch_first=True)
        self.mlp = nn.Linear(12, 12)

    def forward(self, hidden):
        mixed, weights = self.attend(hidden, hidden, hidden)
        hidden = hidden + self.mlp(mixed)
        return BlockOutput(hidden, weights) if self.kind == "dataclass" else ((hidden,), weights)


class Transformer(nn.Module):
    """Blocks that give a nested tuple and a dataclass; the head has a padded vocabulary."""

    def __init__(self, vocabulary: int = K + 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 12)
        self.h = nn.ModuleList([Block("tuple"), Block("dataclass")])
        self.ln = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, vocabulary, bias=False)

    def forward(self, tokens, scale=None):
        hidden = self.embed(tokens)
        hidden = self.h[0](hidden)[0][0]
        hidden = self.h[1](hidden=hidden).hidden
        return self.lm_head(self.ln(hidden))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.idle = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x):
        return self.act(self.fc(self.act(self.fc(self.act(x)))))


SEEDING = threading.Lock()


def seeded(make, *args):
    with SEEDING:  # threads share torch's generator
        torch.manual_seed(7)
        return make(*args)


def mlp_batches(n: int = 100, size: int = 32):
    rng = np.random.default_rng(3)
    X = torch.from_numpy(rng.standard_normal((n, 8)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, K, n))
    return [(X[i : i + size], y[i : i + size]) for i in range(0, n, size)]


def wide_batches():
    """1500 samples in batches of 100 positions, some of them ignored."""
    batches = mlp_batches(1600, 100)
    for number, (_, labels) in enumerate(batches):
        labels[number::16] = -1
    return batches


def token_batches():
    rng = np.random.default_rng(4)
    batches = []
    for length in (7, 5):
        tokens = torch.from_numpy(rng.integers(0, K, (3, length)))
        labels = torch.roll(tokens, -1, 1)
        labels[:, -1] = -100
        labels[1, 2:] = -1
        batches.append((tokens, labels))
    return batches


def dump_wide(path, batches=None, **options):
    return nc.dump(
        seeded(Mlp, 32), wide_batches() if batches is None else batches, path, "train",
        WIDE_LAYERS, dtype="float32", **options,
    )  # fmt: skip


def rows_of(store, layer, split="train"):
    part = store.split(split)
    return part.read(layer, 0, part.n_rows)


def by_hand(model, batches, layer):
    """Forward pass in plain eval mode; `layer` maps a model and inputs to rows."""
    modes = [m.training for m in model.modules()]
    model.eval()
    with torch.no_grad():
        rows = torch.cat([layer(model, x) for x, _ in batches])
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return rows


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same_store(one, other, split="train"):
    assert one.validate() == []
    a, b = one.split(split), other.split(split)
    assert a.finalized
    assert a.layers == b.layers
    assert a.head == b.head
    for name, array in a.arrays.items():
        assert array.chunks == b.arrays[name].chunks
        np.testing.assert_array_equal(array[:], b.arrays[name][:])
    for layer in a.layers:
        assert a.fingerprint(layer) == b.fingerprint(layer)
    assert one.classifiers == other.classifiers
    for layer in one.classifiers:
        for x, y in zip(one.classifier(layer), other.classifier(layer), strict=True):
            np.testing.assert_array_equal(x, y)
