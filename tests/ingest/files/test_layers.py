"""Layers: along an axis or an array each, read in one pass, under the names that were given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ncbatch.errors import DataError, NcbatchError, UnknownNameError, UsageError
from ncbatch.ingest import import_classifier, import_features
from ncbatch.store import FeatureStore
from tests.conftest import run_here, tree

X = np.random.default_rng(0).standard_normal((4, 2, 5, 3)).astype(np.float32)  # B, L, T, D
Y = np.arange(20).reshape(4, 5) % 7


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    np.save("y.npy", Y)
    np.savez("parts.npz", h_3=X[:, 0].reshape(20, 3), h_12=X[:, 1, :, :2].reshape(20, 2), y=Y.ravel())  # fmt: skip
    return tmp_path


def stored(layer: str, split: str = "train") -> np.ndarray:
    return FeatureStore.open("s").split(split).read(layer, 0, 20)


@pytest.mark.parametrize("read_bytes", [1, 200, 2**20])
@pytest.mark.parametrize("names", ["h.{}", ["h.0", "h.1"]])
def test_layers_along_an_axis_arrive_in_one_pass(monkeypatch, read_bytes, names):
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", read_bytes)
    done = import_features("s", "train", names, "x.npy", "y.npy")
    assert (done.layers, done.axes) == (("h.0", "h.1"), ("B", "L", "T", "D"))
    for i in range(2):
        np.testing.assert_array_equal(stored(f"h.{i}"), X[:, i].reshape(20, 3))
    np.testing.assert_array_equal(FeatureStore.open("s").split("train").labels(), Y.ravel())
    assert FeatureStore.open("s").validate() == []


def test_one_layer_of_an_axis_is_taken_by_its_index():
    import_features("s", "train", "last", "x.npy", "y.npy", layer_index=1)
    import_features("s", "train", "h.{}", "x.npy", "y.npy", layer_index=0)
    assert FeatureStore.open("s").layers() == ["last", "h.0"]
    np.testing.assert_array_equal(stored("last"), X[:, 1].reshape(20, 3))
    np.testing.assert_array_equal(stored("h.0"), X[:, 0].reshape(20, 3))


@pytest.mark.parametrize("read_bytes", [1, 200, 2**20])
def test_arrays_of_their_own_become_layers_of_their_own_width(monkeypatch, read_bytes):
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", read_bytes)
    done = import_features("s", "train", "h.{}", "parts.npz:h_{}", ":y")
    assert done.layers == ("h.3", "h.12")
    np.testing.assert_array_equal(stored("h.3"), X[:, 0].reshape(20, 3))
    np.testing.assert_array_equal(stored("h.12"), X[:, 1, :, :2].reshape(20, 2))
    import_features("s", "test", ["a", "b"], "parts.npz:h_{}", ":y")
    np.testing.assert_array_equal(stored("b", "test"), X[:, 1, :, :2].reshape(20, 2))


REFUSED = {
    "one name": (dict(layer="h"), r"1 layer name for 2 layers, features of shape \(4, 2, 5, 3\).*\nwrite --layer 'h.{}'"),
    "three names": (dict(layer=["a", "b", "c"]), "3 layer names for 2 layers"),
    "twice": (dict(layer=["a", "a"]), "--layer a twice"),
    "two patterns": (dict(layer=["a.{}", "b"]), "one pattern, or a name per layer"),
    "pattern of one": (dict(features="f.npy"), "for a single layer in 'f.npy'; expected a name without"),
    "index of none": (dict(features="f.npy", layer="h", layer_index=0), r"layers on an axis\nsuch as --axes N,L,D"),
    "index too high": (dict(layer_index=2), "--layer-index 2; expected 0 to 1"),
    "axes and keys": (dict(features="l.npz:h_{}", axes="N,L,D"), "by array or by axis, not both"),
    "no such key": (dict(features="parts.npz:g_{}"), "no array 'g_{}' in 'parts.npz'; expected one of"),
    "key in path": (dict(features="x{}.npy"), "no features at"),
    "rows": (dict(features="uneven.npz:h_{}"), "9 rows in 'uneven.npz:h_1'; expected 20"),
    "predictions": (dict(predictions="y.npy"), "predictions with 2 layers; expected the one layer"),
    "bad name": (dict(layer="a/{}"), "a/{}"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_names_and_layers_that_do_not_fit_are_refused_before_anything_is_written(case):
    flat = X[:, 0].reshape(20, 3)
    np.save("f.npy", flat)
    np.savez("l.npz", h_0=flat[:, None])
    np.savez("uneven.npz", h_0=flat, h_1=flat[:9])
    options, message = REFUSED[case]
    before = tree(Path())
    with pytest.raises(NcbatchError, match=message) as refused:
        import_features(
            "s", "train", **({"layer": "h.{}", "features": "x.npy", "labels": "y.npy"} | options)
        )
    assert isinstance(refused.value, UsageError | DataError | UnknownNameError)
    assert tree(Path()) == before


def test_numbers_of_layers_may_have_leading_zeros():
    flat = X[:, 0].reshape(20, 3)
    np.savez("a.npz", layer_00=flat, layer_01=-flat, layer_10=2 * flat, y=Y.ravel())
    done = import_features("s", "train", "h.{}", "a.npz:layer_{}", ":y")
    assert done.layers == ("h.0", "h.1", "h.10")
    np.testing.assert_array_equal(stored("h.1"), -flat)
    np.savez("b.npz", layer_1=flat, layer_01=flat)
    with pytest.raises(DataError, match=r"'b.npz' holds 'layer_1' and 'layer_01'; expected one"):
        import_features("t", "train", "h.{}", "b.npz:layer_{}", "y.npy")


@pytest.mark.parametrize("later", [{"h_0"}, {"h_0", "h_1", "h_2"}, {"h_0", "h_2"}])
def test_every_file_holds_the_same_layers(later: set[str]):
    flat = X[:, 0].reshape(20, 3)
    np.savez("k0.npz", h_0=flat, h_1=flat, y=Y.ravel())
    np.savez("k1.npz", y=Y.ravel(), **dict.fromkeys(later, flat))
    with pytest.raises(DataError, match=r"'k1.npz' holds layers 0.*; expected 0, 1, as 'k0.npz'"):
        import_features("s", "train", "h.{}", "k?.npz:h_{}", ":y")
    assert not Path("s").exists()


def test_layers_have_the_same_rows_file_by_file():
    for number, rows in enumerate([(4, 2), (2, 4)]):
        np.savez(
            f"k{number}.npz", h_0=X[0, 0, : rows[0]], h_1=X[0, 0, : rows[1]], y=Y[0, : rows[0]]
        )
    with pytest.raises(DataError, match=r"2 rows in 'k0.npz:h_1'; expected 4, as in 'k0.npz:h_0'"):
        import_features("s", "train", "h.{}", "k?.npz:h_{}", ":y")
    np.savez("turned.npz", h_0=X[:, 0], h_1=X[:, 0].transpose(1, 0, 2), y=Y)
    with pytest.raises(DataError, match=r"5 x 4 rows in 'turned.npz:h_1'; expected 4 x 5"):
        import_features("s", "train", "h.{}", "turned.npz:h_{}", ":y", axes="B,T,D")


def test_the_command_line_takes_patterns_names_and_axes(folder):
    line = ["import", "s", "--split", "train", "--features", "x.npy", "--labels", "y.npy"]
    done = run_here(*line, "--layer", "h.{}", "--axes", "B,L,T,D", cwd=folder)
    assert done.code == 0, done.err
    assert "axes of the features: B,L,T,D" in done.out
    assert "20 rows of 3 features of 2 layers imported into s/train/h.0, h.1" in done.out
    done = run_here(*line, "--layer", "a", "--layer", "b", cwd=folder)
    assert done.code == 0, done.err
    done = run_here(*line, "--layer", "c", "--layer-index", 1, cwd=folder)
    assert done.code == 0, done.err
    assert FeatureStore.open("s").layers() == ["h.0", "h.1", "a", "b", "c"]


def test_a_classifier_comes_from_any_format(tmp_path):
    import torch
    from safetensors.torch import save_file

    import_features("s", "train", "h.{}", "x.npy", "y.npy")
    weight = torch.randn(7, 3).to(torch.bfloat16)
    torch.save({"model": {"lm_head": {"weight": weight}}}, "m.pt")
    save_file({"lm_head.weight": weight, "bias": torch.ones(7)}, "m.safetensors")
    assert import_classifier("s", "h.1", "m.pt:model.lm_head.weight") == (7, 3)
    assert import_classifier("s", "h.0", "m.safetensors:lm_head.weight", "m.safetensors:bias") == (7, 3)  # fmt: skip
    for layer in ("h.0", "h.1"):
        found, _ = FeatureStore.open("s").classifier(layer)
        np.testing.assert_array_equal(np.asarray(found, np.float32), weight.float().numpy())
