"""What hooks take from forward passes, and a model that is left as it was."""

from __future__ import annotations

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError
from tests.ingest.model.models import (
    K,
    Mlp,
    Shared,
    Transformer,
    by_hand,
    hooks_of,
    mlp_batches,
    rows_of,
    seeded,
    token_batches,
)

torch = pytest.importorskip("torch")
nn = torch.nn


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


def test_integer_features_are_refused(tmp_path):
    batches = [(torch.zeros((2, 4), dtype=int), torch.tensor([0, 1]))]
    with pytest.raises(DataError, match="'embed:input' has dtype int64"):
        nc.dump(seeded(Transformer), batches, tmp_path / "s.zarr", "train", ["embed:input"])
    assert not (tmp_path / "s.zarr").exists()


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
