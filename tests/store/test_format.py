"""What is written is what any reader gets back, and the arrays on disk are as format 1 says."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from ncbatch.store import FeatureStore
from ncbatch.store.format import LayerSpec, chunk_rows

DTYPES = ["float16", "bfloat16", "float32", "float64"]
LABELS = np.arange(300) % 5


def in_memory(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def rows(dtype: str, width: int = 4) -> np.ndarray:
    """Every kind of value: negative, zero, subnormal, largest, infinite and not a number."""
    values = np.random.default_rng(0).standard_normal((300, width)) * 100
    values[7] = 0.0
    values = values.astype(in_memory(dtype))
    info = ml_dtypes.finfo(in_memory(dtype))
    values[8, :4] = info.max, -info.max, info.tiny, info.smallest_subnormal
    values[9, :4] = np.inf, -np.inf, np.nan, -0.0
    return values


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Compare in float64, which holds all of the dtypes: NumPy knows no NaN of bfloat16."""
    np.testing.assert_array_equal(np.asarray(found, np.float64), wanted.astype(np.float64))


def make(path: Path, dtype: str) -> FeatureStore:
    store = FeatureStore.create(path, 5, {"h": 4, "fc.1": 16}, dtype)
    with store.writer("train", head="h") as writer:
        writer.append({"h": rows(dtype), "fc.1": rows(dtype, 16)}, LABELS, LABELS[::-1])
    return FeatureStore.open(path)


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(dtype: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
        return Path(make(tmp_path_factory.mktemp(dtype) / "s", dtype).path)


class TestRoundTrip:
    def test_split_reads_the_stored_values(self, path, dtype):
        split = FeatureStore.open(path).split("train")
        wanted = rows(dtype)
        for start, stop in [(0, 300), (0, 1), (63, 65), (299, 300), (10, 250)]:
            found = split.read("h", start, stop)
            assert found.dtype == (np.float32 if dtype == "bfloat16" else wanted.dtype)
            assert_same(found, wanted[start:stop])
            np.testing.assert_array_equal(split.labels(start, stop), LABELS[start:stop])
            np.testing.assert_array_equal(split.predictions(start, stop), LABELS[::-1][start:stop])
        assert split.read("fc.1", 0, 300).shape == (300, 16)
        assert split.spec("h") == LayerSpec(4, dtype)

    def test_dask_blocks_are_the_chunks(self, path, dtype):
        store = FeatureStore.open(path)
        array = store.to_dask("train", "h")
        assert array.chunks[0][0] == store.split("train").feature("h").chunks[0]
        assert array.dtype == ("float64" if dtype == "float64" else "float32")
        assert_same(array.compute(scheduler="synchronous"), rows(dtype))

    def test_xarray_view_is_lazy_and_equal(self, path, dtype):
        dataset = FeatureStore.open(path).to_xarray("train", "h")
        assert dataset["feature"].chunks is not None
        assert dataset["feature"].dims == ("sample", "unit")
        assert_same(dataset["feature"].values, rows(dtype))
        np.testing.assert_array_equal(dataset["label"], LABELS)
        np.testing.assert_array_equal(dataset["prediction"], LABELS[::-1])

    def test_xarray_opens_a_layer_by_path(self, path, dtype):
        dataset = xr.open_zarr(path / "train/layers/h", consolidated=False)
        assert dataset["feature"].dims == ("sample", "unit")
        assert_same(dataset["feature"].values, rows(dtype))

    def test_zarr_opens_the_store(self, path, dtype):
        group = zarr.open_group(path, mode="r")
        found = group["train/layers/h/feature"][:]
        assert found.dtype == in_memory(dtype)
        assert_same(found, rows(dtype))


def test_to_xarray_leaves_out_holes(tmp_path):
    store = FeatureStore.create(tmp_path / "s", 5, {"h": 4}, "float32")
    labels = np.where(np.arange(300) % 3, LABELS, -7)
    with store.writer("train") as writer:
        writer.append({"h": rows("float32")}, labels)
    dataset = store.to_xarray("train", "h")
    kept = labels >= 0
    assert "prediction" not in dataset
    np.testing.assert_array_equal(dataset["label"], labels[kept])
    np.testing.assert_array_equal(dataset["feature"], rows("float32")[kept])
    assert store.split("train").n_samples == 200
    assert store.split("train").n_rows == 300


# ---------------------------------------------------------------------------- format 1 on disk


def array_metadata(path: Path) -> dict[str, dict]:
    return {
        str(file.parent.relative_to(path)): found
        for file in path.rglob("zarr.json")
        if (found := json.loads(file.read_text()))["node_type"] == "array"
    }


@pytest.mark.usefixtures("small_chunks")
def test_every_array_names_dimensions_and_carries_checksums(tmp_path):
    store = make(tmp_path / "s", "float32")
    store.set_classifier("h", np.ones((5, 4)), np.ones(5))
    dimensions = {
        "train/label": ["sample"],
        "train/prediction": ["sample"],
        "train/layers/h/feature": ["sample", "unit"],
        "train/layers/fc.1/feature": ["sample", "unit"],
        "classifier/h/weight": ["class", "unit"],
        "classifier/h/bias": ["class"],
    }
    found = array_metadata(tmp_path / "s")
    assert {name: array["dimension_names"] for name, array in found.items()} == dimensions
    for array in found.values():
        assert [codec["name"] for codec in array["codecs"]] == ["bytes", "crc32c"]
    assert found["train/label"]["data_type"] == "int32"
    assert found["train/label"]["fill_value"] == -1
    assert found["train/layers/h/feature"]["fill_value"] == "NaN"


@pytest.mark.usefixtures("small_chunks")
def test_label_chunks_are_the_base_block_and_feature_chunks_nest_in_it(tmp_path):
    split = make(tmp_path / "s", "float32").split("train")
    assert split.feature("h").chunks == (64, 4)
    assert split.feature("fc.1").chunks == (16, 16)
    assert split.arrays["label"].chunks == split.arrays["prediction"].chunks == (64,)
    assert split.base_block == 64


@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_zeros_exist_on_disk(tmp_path):
    store = FeatureStore.create(tmp_path / "s", 1, {"h": 4}, "float32")
    with store.writer("train") as writer:
        writer.append({"h": np.zeros((200, 4))}, np.zeros(200, int))
    chunks = sorted(p.name for p in (tmp_path / "s/train/layers/h/feature/c").iterdir())
    assert chunks == ["0", "1", "2", "3"]
    assert len(list((tmp_path / "s/train/label/c").iterdir())) == 4


@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_nothing_but_fill_values_exist_on_disk(tmp_path):
    store = FeatureStore.create(tmp_path / "s", 1, {"h": 4}, "float32")
    with store.writer("train", head="h") as writer:
        holes = np.full(200, -1)
        writer.append({"h": np.full((200, 4), np.nan)}, holes, holes)
    for name in ("layers/h/feature", "label", "prediction"):
        assert len(list((tmp_path / "s/train" / name / "c").iterdir())) == 4
    assert store.validate() == []


def test_header_holds_format_id_and_classes(tmp_path):
    store = FeatureStore.create(
        tmp_path / "s", 3, {"h": 4}, "bfloat16", class_names=["a", "b", "ç"]
    )
    header = json.loads((tmp_path / "s/zarr.json").read_text())["attributes"]["ncbatch"]
    assert (header["format"], header["n_classes"]) == (1, 3)
    assert header["id"] == store.id == FeatureStore.open(tmp_path / "s").id
    assert FeatureStore.open(tmp_path / "s").class_names == ["a", "b", "ç"]
    assert FeatureStore.open(tmp_path / "s").declared_layers == {"h": LayerSpec(4, "bfloat16")}
    assert store.id != FeatureStore.create(tmp_path / "t", 3).id


@given(
    st.integers(1, 200_000), st.sampled_from(DTYPES), st.none() | st.integers(0, 10**9)
)  # fmt: skip
def test_chunk_rows_are_the_largest_power_of_two_that_fits(width, dtype, n):
    spec = LayerSpec(width, dtype)
    found = chunk_rows(spec, n)
    assert found >= 1
    assert found & (found - 1) == 0
    assert found == 1 or found * spec.row_bytes <= 16 * 2**20
    enough = n is not None and found >= n
    assert enough or found == 2**20 or 2 * found * spec.row_bytes > 16 * 2**20
    assert n is None or found == 1 or found < 2 * n
