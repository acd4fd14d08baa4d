"""The linear module that classifies: found, stored, and its decisions, also as labels."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError, UsageError
from tests.ingest.model.models import (
    K,
    Mlp,
    Shared,
    Transformer,
    by_hand,
    mlp_batches,
    rows_of,
    seeded,
    token_batches,
)

torch = pytest.importorskip("torch")
nn = torch.nn


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


def test_a_shared_head_is_no_classifier(tmp_path):
    store = nc.dump(
        seeded(Shared), mlp_batches(), tmp_path / "s.zarr", "train", {"x": ":input"}, n_classes=K
    )
    assert store.classifiers == []


def test_a_head_with_too_few_outputs(tmp_path):
    with pytest.raises(DataError, match="head 'fc' has 5 outputs; expected 9 or more"):
        nc.dump(seeded(Mlp), mlp_batches(), tmp_path / "s.zarr", "train", ["fc:input"], n_classes=9)
    assert "train" not in nc.FeatureStore.open(tmp_path / "s.zarr").splits


def test_nan_in_the_first_batch_hides_no_head(tmp_path):
    model, batches = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, K)), mlp_batches()
    batches[0][0][3] = torch.nan
    for number, (layer, head) in enumerate([("1:input", None), ("0", "1")]):
        path = tmp_path / f"s{number}.zarr"
        store = nc.dump(model, batches, path, "train", [layer], head=head)
        assert store.classifiers == [layer]
        assert store.split("train").head == layer


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


def test_the_heads_decisions_become_the_labels(tmp_path):
    model, batches = seeded(Mlp), mlp_batches()
    marks = [(x, torch.where(y == 2, -5, y * 1000)) for x, y in batches]
    layers = ["act1", "fc:input"]
    store = nc.dump(
        model, marks, tmp_path / "s.zarr", "train", layers, argmax_labels=True, dtype="float32"
    )
    kept = torch.cat([y for _, y in batches]).numpy() != 2
    decided = by_hand(model, batches, lambda m, x: m(x)).argmax(1).numpy()[kept]
    split = store.split("train")
    assert store.n_classes == K
    np.testing.assert_array_equal(split.labels(), decided)
    np.testing.assert_array_equal(split.predictions(), decided)
    h = by_hand(model, batches, lambda m, x: torch.relu(m.fc1(x))).numpy()[kept]
    np.testing.assert_array_equal(rows_of(store, "act1"), h)


def test_decisions_among_the_first_classes_without_the_heads_layer(tmp_path, caplog):
    model, batches = seeded(Transformer), token_batches()
    with caplog.at_level(logging.WARNING, "ncbatch"):
        store = nc.dump(
            model, batches, tmp_path / "s.zarr", "train", ["h.1"], argmax_labels=True, n_classes=3
        )
    assert "no classifier and no predictions stored" in caplog.text
    logits = [by_hand(model, [b], lambda m, t: m(t))[..., :3].flatten(0, 1) for b in batches]
    kept = [labels.reshape(-1) >= 0 for _, labels in batches]
    decided = torch.cat([z[k].argmax(1) for z, k in zip(logits, kept, strict=True)])
    np.testing.assert_array_equal(store.split("train").labels(), to_numpy(decided))
    assert store.split("train").head is None


def test_layers_are_added_under_the_same_decisions(tmp_path):
    model, batches = seeded(Mlp), mlp_batches()
    store = nc.dump(model, batches, tmp_path / "s.zarr", "train", ["act1"], argmax_labels=True)
    nc.dump(model, batches, store, "train", ["fc:input"], argmax_labels=True)
    assert store.split("train").layers == ["act1", "fc:input"]
    with pytest.raises(DataError, match="as stored in split 'train'"):
        nc.dump(model, batches, store, "train", ["fc2"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": False, "n_classes": K}, UsageError, "argmax_labels with head=False"),
        ({"n_classes": 9}, DataError, "head 'fc' has 5 outputs; expected 9 or more"),
        ({"layers": ["fc1"], "n_classes": 9}, DataError, "head 'fc' has 5 outputs"),
    ],
)
def test_decisions_need_a_head(tmp_path, options, error, message):
    options = {"layers": ["fc:input"]} | options
    layers = options.pop("layers")
    with pytest.raises(error, match=message):
        nc.dump(
            seeded(Mlp), mlp_batches(), tmp_path / "s.zarr", "train", layers,
            argmax_labels=True, **options,
        )  # fmt: skip
    path = tmp_path / "s.zarr"
    assert not path.exists() or nc.FeatureStore.open(path).splits == []


def test_decisions_at_other_positions_are_no_labels(tmp_path):
    batches = [(torch.arange(12).reshape(3, 4) % K, torch.tensor([0, 1, 2]))]
    with pytest.raises(DataError, match="head 'lm_head': no decisions at the positions"):
        nc.dump(
            seeded(Transformer), batches, tmp_path / "s.zarr", "train", ["h.0"],
            pool="mean", argmax_labels=True,
        )  # fmt: skip
    assert not (tmp_path / "s.zarr").exists()


def test_a_model_without_a_head_decides_nothing(tmp_path):
    batches = [(torch.zeros(2, 8), torch.tensor([0, 1]))]
    with pytest.raises(DataError, match=r"no torch\.nn\.Linear ran: no decisions"):
        nc.dump(
            torch.nn.Identity(), batches, tmp_path / "s.zarr", "train", {"x": ""},
            n_classes=K, argmax_labels=True,
        )  # fmt: skip
