"""nc.dump: what is captured, what is stored, what is left behind, and going on after a kill."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError, StoreError, UnknownNameError, UsageError
from ncbatch.ingest.model import capture
from ncbatch.ingest.model.places import Batch
from ncbatch.store import format as store_format
from ncbatch.store import writer as row_buffer
from ncbatch.store import writer as writing

torch = pytest.importorskip("torch")
nn = torch.nn

REPOSITORY = Path(__file__).parents[3]
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


# What is captured


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_features_equal_a_forward_pass_by_hand(tmp_path, dtype):
    model, batches = seeded(Mlp), mlp_batches()
    layers = {"in": "fc1:input", "h1": "act1", "z2": "fc2", "h2": "act2", "last": "fc:input"}
    store = nc.dump(model, batches, tmp_path / "s.zarr", "train", layers, dtype=dtype)

    def h1(m, x):
        return torch.relu(m.fc1(x))

    expected = {
        "in": lambda m, x: x,
        "h1": h1,
        "z2": lambda m, x: m.fc2(h1(m, x)),  # before the in-place activation
        "h2": lambda m, x: torch.relu(m.fc2(h1(m, x))),
        "last": lambda m, x: m.norm(torch.relu(m.fc2(h1(m, x)))),
    }
    assert store.split("train").layers == list(layers)
    assert store.n_classes == K
    for name, layer in expected.items():
        rows = by_hand(model, batches, layer).to(getattr(torch, dtype))
        stored = store.split("train").feature(name)
        assert str(stored.dtype) == dtype
        np.testing.assert_array_equal(stored[:], to_numpy(rows))
    np.testing.assert_array_equal(
        store.split("train").labels(), torch.cat([y for _, y in batches]).numpy()
    )
    assert store.validate() == []


def test_one_forward_pass_per_batch(tmp_path):
    model, batches = seeded(Mlp), mlp_batches()
    nc.dump(model, batches, tmp_path / "s.zarr", "train", ["fc1", "fc2", "act1", "fc:input"])
    assert model.passes == len(batches)


@pytest.mark.parametrize("pool", ["flatten", "mean"])
def test_convolution_maps(tmp_path, pool):
    model = seeded(Cnn)
    images = torch.randn(10, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.arange(10) % K)]
    store = nc.dump(
        model,
        batches,
        tmp_path / "s.zarr",
        "train",
        ["conv", "fc:input"],
        pool=pool,
        dtype="float32",
    )
    maps = by_hand(model, batches, lambda m, x: m.conv(x))
    rows = maps.flatten(1) if pool == "flatten" else maps.mean((2, 3))
    np.testing.assert_array_equal(rows_of(store, "conv"), rows.numpy())
    assert store.classifiers == ["fc:input"]


def test_mean_of_sequences_and_volumes(tmp_path):
    class Reshapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.sequence, self.volume, self.flat = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x):
            self.sequence(x.reshape(4, 6, 4))
            self.volume(x.reshape(4, 3, 2, 2, 2))
            return self.flat(x)

    x = torch.arange(96.0).reshape(4, 24)
    store = nc.dump(
        Reshapes(), [(x, [0, 1, 2, 0])], tmp_path / "s.zarr", "train",
        ["sequence", "volume", "flat"], pool="mean", dtype="float32", n_classes=3,
    )  # fmt: skip
    np.testing.assert_array_equal(rows_of(store, "sequence"), x.reshape(4, 6, 4).mean(1))
    np.testing.assert_array_equal(rows_of(store, "volume"), x.reshape(4, 3, 8).mean(2))
    np.testing.assert_array_equal(rows_of(store, "flat"), x)


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "mapping"])
def test_tokens_with_ignored_positions(tmp_path, inputs):
    model, batches = seeded(Transformer), token_batches()
    wrap = {"tensor": lambda t: t, "tuple": lambda t: (t, None), "mapping": lambda t: {"tokens": t}}
    given = [(wrap[inputs](tokens), labels) for tokens, labels in batches]
    layers = {
        "embed": "embed",
        "h0": "h.0",
        "h1": "h.1",
        "in1": "h.1:input",
        "head": "lm_head:input",
    }
    store = nc.dump(
        model, given, tmp_path / "s.zarr", "train", layers, n_classes=K, dtype="float32"
    )
    kept = [labels.reshape(-1) >= 0 for _, labels in batches]
    labels = torch.cat([y.reshape(-1)[k] for (_, y), k in zip(batches, kept, strict=True)])
    part = store.split("train")
    np.testing.assert_array_equal(part.labels(), labels.numpy())
    assert part.n_samples == part.n_rows == sum(int(k.sum()) for k in kept)

    hidden = {
        "embed": lambda m, t: m.embed(t),
        "h0": lambda m, t: m.h[0](m.embed(t))[0][0],
        "in1": lambda m, t: m.h[0](m.embed(t))[0][0],
        "h1": lambda m, t: m.h[1](m.h[0](m.embed(t))[0][0]).hidden,
        "head": lambda m, t: m.ln(m.h[1](m.h[0](m.embed(t))[0][0]).hidden),
    }
    for name, layer in hidden.items():
        rows = [
            by_hand(model, [b], layer).flatten(0, 1)[k] for b, k in zip(batches, kept, strict=True)
        ]
        np.testing.assert_array_equal(rows_of(store, name), torch.cat(rows).numpy())

    weight, bias = store.classifier("head")
    np.testing.assert_array_equal(weight, model.lm_head.weight[:K].detach().numpy())
    assert bias is None
    logits = [by_hand(model, [b], lambda m, t: m(t))[..., :K].flatten(0, 1) for b in batches]
    decided = torch.cat([z[k].argmax(1) for z, k in zip(logits, kept, strict=True)])
    np.testing.assert_array_equal(part.predictions(), decided.numpy())
    assert part.head == "head"


def test_numpy_inputs_and_batches_without_samples(tmp_path):
    model, batches = seeded(Mlp), mlp_batches()
    expected = nc.dump(model, batches, tmp_path / "a.zarr", "train", "fc1")
    given = [(x.numpy(), y.numpy().astype(np.uint8)) for x, y in batches]
    given.insert(1, (np.full((4, 8), np.nan, np.float32), -np.ones(4, np.int64)))
    given.insert(0, given[1])
    store = nc.dump(model, given, tmp_path / "b.zarr", "train", "fc1")
    np.testing.assert_array_equal(rows_of(store, "fc1"), rows_of(expected, "fc1"))


def test_half_precision_model(tmp_path):
    model = seeded(Mlp).bfloat16()
    batches = [(x.bfloat16(), y) for x, y in mlp_batches()]
    store = nc.dump(model, batches, tmp_path / "s.zarr", "train", ["fc:input"], dtype="bfloat16")
    rows = by_hand(model, batches, lambda m, x: m.norm(torch.relu(m.fc2(torch.relu(m.fc1(x))))))
    np.testing.assert_array_equal(rows_of(store, "fc:input"), rows.float().numpy())
    np.testing.assert_array_equal(
        store.classifier("fc:input")[0], model.fc.weight.float().detach().numpy()
    )


# What is left behind


def test_training_modes_are_restored_per_module(tmp_path):
    model = seeded(Mlp)
    model.train()
    model.norm.eval()  # deliberately frozen
    before = {name: m.training for name, m in model.named_modules()}
    running = model.norm.running_mean.clone()
    nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"])
    assert {name: m.training for name, m in model.named_modules()} == before
    assert before[""]
    assert not before["norm"]
    assert torch.equal(model.norm.running_mean, running)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "batches"])
def test_hooks_and_modes_after_an_exception(tmp_path, error, where):
    model = seeded(Mlp)
    model.norm.eval()

    def fail(*_):
        raise error("on purpose")

    def batches():
        yield from mlp_batches()
        if where == "model":
            model.norm.forward = fail
            yield from mlp_batches()
        fail()

    with pytest.raises(error, match="on purpose"):
        nc.dump(model, batches(), tmp_path / "s.zarr", "train", ["fc1", "act1:input"])
    assert hooks_of(model) == 0
    assert model.training
    assert not model.norm.training
    assert model.drop.training
    assert "train" not in nc.FeatureStore.open(tmp_path / "s.zarr").splits


def test_hooks_of_others_stay(tmp_path):
    model = seeded(Mlp)
    seen = []
    model.fc1.register_forward_hook(lambda *_: seen.append(1))
    nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"])
    assert len(seen) == len(mlp_batches())
    assert hooks_of(model) == 1


def test_progress_counts_rows(tmp_path):
    class Bar:
        rows = 0

        def advance(self, n_rows):
            self.rows += n_rows

    bar = Bar()
    nc.dump(seeded(Mlp), mlp_batches(100), tmp_path / "s.zarr", "train", ["fc1"], progress=bar)
    assert bar.rows == 100


# The classifier and its decisions


def test_classifier_and_predictions_at_the_layer_the_head_reads(tmp_path):
    model, batches = seeded(Mlp), mlp_batches()
    store = nc.dump(
        model, batches, tmp_path / "s.zarr", "train", ["fc1", "act2", "drop", "fc:input"]
    )
    assert store.classifiers == ["fc:input"]  # 'drop' equals it too: one name is enough
    weight, bias = store.classifier("fc:input")
    np.testing.assert_array_equal(weight, model.fc.weight.detach().numpy())
    np.testing.assert_array_equal(bias, model.fc.bias.detach().numpy())
    part = store.split("train")
    assert part.head == "fc:input"
    np.testing.assert_array_equal(
        part.predictions(), by_hand(model, batches, lambda m, x: m(x)).argmax(1).numpy()
    )


def test_the_output_of_the_module_before_the_head_will_do(tmp_path):
    store = nc.dump(seeded(Mlp), mlp_batches(), tmp_path / "s.zarr", "train", ["fc1", "drop"])
    assert store.classifiers == ["drop"]
    assert store.split("train").head == "drop"


def test_no_layer_before_the_head_is_noted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ncbatch"):
        store = nc.dump(seeded(Mlp), mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"])
    assert "'fc:input'" in caplog.text
    assert store.classifiers == []
    assert store.split("train").head is None


def test_predictions_and_head_can_be_turned_off(tmp_path, caplog):
    model, batches = seeded(Mlp), mlp_batches()
    store = nc.dump(model, batches, tmp_path / "a.zarr", "train", ["drop"], predictions=False)
    assert store.classifiers == ["drop"]
    assert store.split("train").head is None
    with caplog.at_level(logging.WARNING, "ncbatch"):
        store = nc.dump(
            model, batches, tmp_path / "b.zarr", "train", ["drop"], head=False, n_classes=K
        )
    assert store.classifiers == []
    assert caplog.text == ""


def test_a_named_head(tmp_path):
    model = seeded(Mlp)
    store = nc.dump(
        model, mlp_batches(), tmp_path / "s.zarr", "train", ["act1"], head="fc2", n_classes=K
    )
    weight, _ = store.classifier("act1")
    np.testing.assert_array_equal(weight, model.fc2.weight[:K].detach().numpy())


def test_a_head_at_other_positions_decides_nothing(tmp_path):
    model = seeded(Transformer)
    batches = [(torch.arange(12).reshape(3, 4) % K, torch.tensor([0, 1, 2]))]
    store = nc.dump(
        model,
        batches,
        tmp_path / "s.zarr",
        "train",
        ["h.0", "lm_head:input"],
        pool="mean",
        n_classes=K,
    )
    assert store.classifiers == []
    assert store.split("train").head is None


def test_linear_modules_that_do_not_run_are_no_heads(tmp_path):
    model = seeded(Mlp)
    model.unused = nn.Linear(16, 3)
    store = nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc:input"])
    assert store.classifiers == ["fc:input"]
    assert store.n_classes == K


def test_two_models_do_not_mix_in_one_store(tmp_path):
    path = tmp_path / "s.zarr"
    model = seeded(Mlp)
    nc.dump(model, mlp_batches(), path, "train", ["fc:input"])
    nc.dump(model, mlp_batches(), path, "test", ["fc:input"])
    with torch.no_grad():
        model.fc.weight.mul_(2)
    with pytest.raises(DataError, match="differs from the classifier"):
        nc.dump(model, mlp_batches(), path, "ood", ["fc:input"])
    store = nc.dump(model, mlp_batches(), path, "test", ["fc:input"], overwrite=True)
    np.testing.assert_array_equal(store.classifier("fc:input")[0], model.fc.weight.detach().numpy())


# Stores and splits that exist


def test_declared_layers_keep_their_spec(tmp_path):
    store = nc.FeatureStore.create(tmp_path / "s.zarr", K, {"fc1": 16, "fc2": 16}, "float32")
    again = nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc2"])
    assert again is store
    assert store.split("train").spec("fc2").dtype == "float32"
    nc.dump(seeded(Mlp), mlp_batches(), store, "test", ["fc2", "act1"])
    assert store.split("test").layers == ["fc2", "act1"]
    assert store.split("test").spec("act1").dtype == "float32"  # as what it is written with
    nc.dump(seeded(Mlp), mlp_batches(), store, "more", ["act2"], dtype="float16")
    with pytest.raises(UsageError, match="several dtypes: fc2 float32, act2 float16"):
        nc.dump(seeded(Mlp), mlp_batches(), store, "both", ["fc2", "act2"])


def test_layers_are_added_later(tmp_path):
    path, model, batches = tmp_path / "s.zarr", seeded(Mlp), mlp_batches()
    store = nc.dump(model, batches, path, "train", ["fc1"])
    assert store.classifiers == []
    nc.dump(model, batches, path, "train", {"last": "fc:input", "act1": "act1"})
    whole = nc.dump(model, batches, tmp_path / "w.zarr", "train", ["fc1", "act1", "fc:input"])
    assert store.split("train").layers == ["fc1", "last", "act1"]
    assert store.classifiers == ["last"]
    for mine, theirs in (("fc1", "fc1"), ("act1", "act1"), ("last", "fc:input")):
        np.testing.assert_array_equal(rows_of(store, mine), rows_of(whole, theirs))
    with pytest.raises(StoreError, match="has layers act1"):
        nc.dump(model, batches, path, "train", ["act1", "fc2"])


def test_layers_are_not_added_to_other_rows(tmp_path):
    path, model, batches = tmp_path / "s.zarr", seeded(Mlp), mlp_batches()
    store = nc.dump(model, batches, path, "train", ["fc1"])
    with pytest.raises(DataError, match="as stored in split 'train'"):
        nc.dump(model, batches[::-1], path, "train", ["act1"])
    with pytest.raises(DataError, match="96 rows for split 'train'"):
        nc.dump(model, batches[:-1], path, "train", ["act1"])
    assert store.split("train").layers == ["fc1"]
    nc.dump(model, batches, path, "train", ["act1"])  # what was left unfinished is no obstacle
    assert store.split("train").layers == ["fc1", "act1"]


def test_layers_are_not_added_to_a_split_with_holes(tmp_path):
    store = nc.FeatureStore.create(tmp_path / "s.zarr", K, {"x": 2})
    with store.writer("train") as writer:
        writer.append({"x": np.zeros((3, 2), np.float16)}, np.array([0, -1, 1]))
    with pytest.raises(StoreError, match="no samples"):
        nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc1"])


def test_a_split_that_exists(tmp_path):
    path, model, batches = tmp_path / "s.zarr", seeded(Mlp), mlp_batches()
    nc.dump(model, batches, path, "train", ["fc1"])
    passes = model.passes
    with pytest.raises(StoreError, match="overwrite=True"):
        nc.dump(model, batches, path, "train", ["fc1"])
    store = nc.dump(model, batches, path, "train", ["fc1"], resume=True)  # nothing to do
    assert model.passes == passes
    nc.dump(model, batches[:2], path, "train", ["fc1"], overwrite=True)
    assert store.split("train").n_samples == 64


# Bad input


def test_unknown_modules_are_refused_before_anything_runs(tmp_path):
    model = seeded(Mlp)
    with pytest.raises(UnknownNameError, match="did you mean 'act1'"):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1", "act_1:input"])
    with pytest.raises(UnknownNameError, match="no module 'head'"):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"], head="head")
    with pytest.raises(DataError, match="head 'act1' is a ReLU"):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"], head="act1")
    with pytest.raises(DataError, match="head 'fc' has 5 outputs"):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"], head="fc", n_classes=9)
    assert model.passes == 0
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool 'max'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"layers": []}, "no layer to capture"),
        ({"layers": {"a/b": "fc1"}}, "layer name 'a/b'"),
        ({"split": "a/b"}, "split name 'a/b'"),
        ({"head": False}, "no number of classes"),
        ({"resume": True, "overwrite": True}, "both resume and overwrite"),
    ],
)
def test_bad_options(tmp_path, options, message):
    model = seeded(Mlp)
    given = {"split": "train", "layers": ["fc1"]} | options
    split, layers = given.pop("split"), given.pop("layers")
    with pytest.raises(UsageError, match=message):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", split, layers, **given)
    assert model.passes == 0


def test_n_classes_must_be_those_of_the_store(tmp_path):
    store = nc.FeatureStore.create(tmp_path / "s.zarr", K)
    with pytest.raises(UsageError, match="n_classes=7"):
        nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc1"], n_classes=7)


def test_a_head_with_too_few_outputs(tmp_path):
    with pytest.raises(DataError, match="head 'fc' has 5 outputs; expected 9 or more"):
        nc.dump(seeded(Mlp), mlp_batches(), tmp_path / "s.zarr", "train", ["fc:input"], n_classes=9)
    assert "train" not in nc.FeatureStore.open(tmp_path / "s.zarr").splits


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.idle = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x):
        return self.act(self.fc(self.act(self.fc(self.act(x)))))


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (["act"], {}, "module 'act' ran 3 times"),
        (["fc:input"], {}, "module 'fc' ran 2 times"),
        (["idle"], {}, "module 'idle' did not run"),
        ([":input"], {"head": "fc"}, "head 'fc' ran 2 times"),
        ([":input"], {"head": "idle"}, "head 'idle' did not run"),
    ],
)
def test_modules_run_once(tmp_path, layers, options, message):
    model = seeded(Shared)
    with pytest.raises(DataError, match=message):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", layers, n_classes=K, **options)
    assert hooks_of(model) == 0


def test_a_shared_head_is_no_classifier(tmp_path):
    store = nc.dump(
        seeded(Shared), mlp_batches(), tmp_path / "s.zarr", "train", {"x": ":input"}, n_classes=K
    )
    assert store.classifiers == []


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no sample in any batch"),
        ([(torch.zeros(2, 8), torch.tensor([-1, -1]))], "no sample in any batch"),
        ([torch.zeros(2, 8)], r"batch 0 is a Tensor; expected a pair"),
        ([(torch.zeros(2, 8), torch.zeros(2))], "labels of shape .2,., float32"),
        ([(torch.zeros(2, 8), torch.tensor([0, 1, 2]))], r"'fc1' has shape \(2, 16\)"),
        ([(torch.zeros(2, 8), torch.zeros((2, 16), dtype=int))], r"'fc1' has shape \(2, 16\)"),
        ([(torch.zeros(2, 8), torch.tensor([0, K]))], "label 5 in row 1"),
    ],
)
def test_bad_batches(tmp_path, batches, message):
    model = seeded(Mlp)
    with pytest.raises(DataError, match=message):
        nc.dump(model, batches, tmp_path / "s.zarr", "train", ["fc1"])
    assert hooks_of(model) == 0


def test_mean_refuses_shapes_it_cannot_average(tmp_path):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.Identity()

        def forward(self, x):
            return self.heads(x.reshape(2, 2, 2, 2))

    with pytest.raises(DataError, match="pool='flatten'"):
        nc.dump(
            Deep(), [(torch.zeros(2, 8), torch.zeros((2, 2), dtype=int))], tmp_path / "s.zarr",
            "train", ["heads"], pool="mean", n_classes=2,
        )  # fmt: skip


def test_integer_features_are_refused(tmp_path):
    batches = [(torch.zeros((2, 4), dtype=int), torch.tensor([0, 1]))]
    with pytest.raises(DataError, match="'embed:input' has dtype int64"):
        nc.dump(seeded(Transformer), batches, tmp_path / "s.zarr", "train", ["embed:input"])
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
def test_an_overflow_in_the_first_batch_leaves_no_store(tmp_path, source):
    batches = [(torch.full((3, 8), 1e6, dtype=source), torch.arange(3))]
    given = (nn.Identity(), batches, tmp_path / "s.zarr", "train", {"x": ""})
    with pytest.raises(DataError, match=r"layer 'x' row 0 overflows float16\n.*--dtype"):
        nc.dump(*given, n_classes=K, head=False)
    assert list(tmp_path.iterdir()) == []
    store = nc.dump(*given, n_classes=K, head=False, dtype="float32")
    assert store.split("train").spec("x").dtype == "float32"


def test_a_dtype_that_was_asked_for_replaces_a_declared_one_without_rows(tmp_path):
    store = nc.FeatureStore.create(tmp_path / "s.zarr", K, {"fc2": 16}, "float16")
    nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc2"], dtype="float32")
    assert store.split("train").spec("fc2").dtype == "float32"
    with pytest.raises(UsageError, match="dtype float16 for layer 'fc2'; expected float32, as in"):
        nc.dump(seeded(Mlp), mlp_batches(), store, "test", ["fc2"], dtype="float16")
    nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc2"], dtype="float16", overwrite=True)
    assert store.split("train").spec("fc2").dtype == "float16"


def test_nan_in_the_first_batch_hides_no_head(tmp_path):
    model, batches = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, K)), mlp_batches()
    batches[0][0][3] = torch.nan
    for number, (layer, head) in enumerate([("1:input", None), ("0", "1")]):
        path = tmp_path / f"s{number}.zarr"
        store = nc.dump(model, batches, path, "train", [layer], head=head)
        assert store.classifiers == [layer]
        assert store.split("train").head == layer


def test_a_cache_made_in_a_dump_serves_in_training(tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache = None
            self.fc = nn.Linear(8, K)

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.arange(float(K))
            return self.fc(x) * self.cache

    model = Scaled()
    nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc:input"])
    model(torch.randn(4, 8)).sum().backward()  # refused for tensors of inference mode
    assert model.fc.weight.grad is not None


def test_rows_are_converted_while_the_model_runs(tmp_path, monkeypatch):
    held, run = [], capture.Capture.run

    def spied(self, *args):
        found = run(self, *args)
        held.append({type(rows) for rows in found.values()})
        return found

    monkeypatch.setattr(capture.Capture, "run", spied)
    store = nc.dump(seeded(Mlp), mlp_batches(), tmp_path / "s.zarr", "train", ["fc1", "fc:input"])
    # The first batch is held, so that the head's input is found among its rows.
    assert held == [{torch.Tensor}, *[{np.ndarray}] * 3]
    assert rows_of(store, "fc1").dtype == np.float16


def test_positions_go_to_a_device_once_per_batch(monkeypatch):
    batch = Batch.of(np.array([0, -1, 2]), 0)
    made, copy = [], torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda x: made.append(1) or copy(x))
    for _ in range(3):
        assert batch.select(torch.tensor([5, 6, 7])).tolist() == [5, 7]
    assert made == [1]


def test_a_dump_goes_on_with_the_same_weights_and_data_only(tmp_path, small_chunks):
    class Stop(Exception):
        pass

    def stopped():
        yield from mlp_batches(400)[:8]
        raise Stop

    def go(batches, model, **options):
        given = (model, batches, tmp_path / "s.zarr", "train", ["fc1"])
        return nc.dump(*given, head=False, n_classes=K, **options)

    with pytest.raises(Stop):
        go(stopped(), seeded(Mlp), identity={"data": "one"})
    changed = seeded(Mlp)
    with torch.no_grad():
        changed.fc1.bias[0] += 1
    with pytest.raises(StoreError, match="was begun with weights"):
        go(mlp_batches(400), changed, resume=True)
    with pytest.raises(StoreError, match="begun with data one; expected two, as this dump was"):
        go(mlp_batches(400), seeded(Mlp), resume=True, identity={"data": "two"})
    assert go(mlp_batches(400), seeded(Mlp), resume=True).split("train").n_samples == 400


def test_a_bias_outside_of_the_head(tmp_path):
    model, outside = seeded(Mlp), torch.tensor([0.0, 50.0, 0.0, 0.0, 0.0])
    given = (model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc:input"])
    store = nc.dump(*given, head="fc", head_bias=outside)
    assert set(store.split("train").predictions().tolist()) == {1}
    own = model.fc.bias.detach()
    np.testing.assert_array_equal(store.classifier("fc:input")[1], (own + outside).numpy())
    with pytest.raises(UsageError, match="head_bias without the name of a head"):
        nc.dump(*given, head_bias=outside, overwrite=True)
    with pytest.raises(DataError, match=r"a bias of shape \(2,\) for head 'fc'; expected \(5,\)"):
        nc.dump(*given, head="fc", head_bias=outside[:2], overwrite=True)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
def test_overflow_names_the_row(tmp_path, source):
    x = torch.ones(6, 8, dtype=source)
    x[1] = torch.inf  # what is infinite already is not an overflow
    x[4, 3] = 1e6
    batches = [(torch.ones(10, 8, dtype=source), torch.zeros(10, dtype=int))]
    batches.append((x, torch.tensor([0, 1, -1, 2, 3, 4])))
    with pytest.raises(DataError, match="layer 'x' row 13 overflows float16"):
        nc.dump(
            nn.Identity(), batches, tmp_path / "s.zarr", "train", {"x": ""}, n_classes=K, head=False
        )


# Interruptions


def wide_batches():
    """1500 samples in batches of 100 positions, some of them ignored."""
    batches = mlp_batches(1600, 100)
    for number, (_, labels) in enumerate(batches):
        labels[number::16] = -1
    return batches


SMALL_CHUNKS = 2**14  # 128 and 256 rows of the layers below, and the labels in blocks of 512
WIDE_LAYERS = {"h1": "act1", "in": "fc1:input", "last": "fc:input"}


def dump_wide(path, batches=None, **options):
    return nc.dump(
        seeded(Mlp, 32), wide_batches() if batches is None else batches, path, "train",
        WIDE_LAYERS, dtype="float32", **options,
    )  # fmt: skip


def kill_at(path: str, moment: str, count: int) -> None:
    """Dump, and SIGKILL this process at the `count`-th time of `moment`."""
    store_format.CHUNK_BYTES = SMALL_CHUNKS
    left = [count]

    def tick(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            tick()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def ticking(batches):
        for batch in batches:
            tick()
            yield batch

    owners = {
        "flush": row_buffer.RowBuffer,
        "save": writing.CommitRecord,
        "finalize_split": writing,
    }
    if moment != "batch":
        before(owners[moment], moment)
    dump_wide(path, ticking(wide_batches()) if moment == "batch" else None)


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("batch", 1),  # nothing there
        ("batch", 3),  # a split without a committed row
        ("batch", 9),
        ("flush", 9),  # features of a block without its labels
        ("save", 2),  # labels without their record
        ("finalize_split", 1),  # everything but the end
    ],
)
@pytest.mark.slow
def test_a_killed_dump_resumes_to_the_same_store(tmp_path, monkeypatch, moment, count):
    path = tmp_path / "s.zarr"
    script = f"from tests.ingest.model.test_dumps import kill_at; kill_at({str(path)!r}, {moment!r}, {count})"
    child = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False, timeout=120)
    assert child.returncode == -signal.SIGKILL

    monkeypatch.setattr(store_format, "CHUNK_BYTES", SMALL_CHUNKS)
    whole = dump_wide(tmp_path / "whole.zarr")
    assert whole.split("train").base_block == 512
    if path.exists():
        store = nc.FeatureStore.open(path)
        assert store.validate() == []
        if "train" in store.splits:
            part = store.split("train")
            labels = part.labels()
            n = int(np.flatnonzero(labels >= 0)[-1]) + 1
            assert part.n_samples == n
            for layer in part.layers:
                np.testing.assert_array_equal(part.read(layer, 0, n), rows_of(whole, layer)[:n])
    resumed = dump_wide(path, resume=True)
    assert_same_store(resumed, whole)


def interrupt(path, monkeypatch, after=9):
    """Stop a dump by an exception after some batches."""
    monkeypatch.setattr(store_format, "CHUNK_BYTES", SMALL_CHUNKS)

    def batches():
        yield from wide_batches()[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dump_wide(path, batches())
    return nc.FeatureStore.open(path)


def test_an_interrupted_dump_skips_whole_batches(tmp_path, monkeypatch):
    store = interrupt(tmp_path / "s.zarr", monkeypatch)
    assert store.split("train").n_samples == 512
    model = seeded(Mlp, 32)
    nc.dump(model, wide_batches(), store, "train", WIDE_LAYERS, dtype="float32", resume=True)
    assert model.passes == 16 - 5
    assert_same_store(store, dump_wide(tmp_path / "whole.zarr"))


def test_resume_wants_the_same_batches(tmp_path, monkeypatch):
    store = interrupt(tmp_path / "s.zarr", monkeypatch)
    with pytest.raises(DataError, match="in the same order"):
        dump_wide(store, wide_batches()[::-1], resume=True)
    with pytest.raises(DataError, match="batches of 279 samples; expected the 512 already stored"):
        dump_wide(store, wide_batches()[:3], resume=True)
    with pytest.raises(DataError, match="predictions of layer none; expected last"):
        dump_wide(store, predictions=False, resume=True)
    with pytest.raises(StoreError, match="begun with layers h1, in, last"):
        nc.dump(seeded(Mlp, 32), wide_batches(), store, "train", ["fc1"], resume=True)
    with pytest.raises(StoreError, match="resume=True"):
        dump_wide(store)
    dump_wide(store, resume=True)
    assert_same_store(store, dump_wide(tmp_path / "whole.zarr"))


def test_an_interrupted_dump_can_start_again(tmp_path, monkeypatch):
    store = interrupt(tmp_path / "s.zarr", monkeypatch)
    dump_wide(store, overwrite=True)
    assert_same_store(store, dump_wide(tmp_path / "whole.zarr"))


def test_importing_ingest_loads_no_torch():
    script = "import sys, ncbatch.ingest; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
