"""Axes: rows come in the order of sequences and positions, whatever the order of the axes in the file."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.files.layers import as_rows, find_axes, open_shards, parse_axes
from tests.ingest.files.formats import writers as w

SIZES = {"N": 7, "B": 3, "T": 5, "L": 4, "D": 6}
SPELLINGS = [
    "N,D", "T,D", "B,T,D", "L,N,D", "N,L,D", "L,T,D", "T,L,D", "L,B,T,D", "B,L,T,D", "B,T,L,D",
]  # fmt: skip


def make(axes: tuple[str, ...]) -> np.ndarray:
    """Let each value tell its index."""
    shape = [SIZES[a] for a in axes]
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def by_hand(array: np.ndarray, axes: tuple[str, ...], layer: int) -> np.ndarray:
    """Collect the rows of a layer one at a time."""
    counted = [a for a in ("N", "B", "T") if a in axes]
    rows = []
    for at in itertools.product(*(range(SIZES[a]) for a in counted)):
        index = dict(zip(counted, at, strict=True)) | {"L": layer, "D": slice(None)}
        rows.append(array[tuple(index[a] for a in axes)])
    return np.stack(rows)


@pytest.mark.parametrize("save", [w.save_npy, w.save_npz, w.save_hdf5, w.save_parquet])
@pytest.mark.parametrize("text", SPELLINGS)
def test_rows_come_in_order_for_every_spelling(tmp_path: Path, save, text):
    axes = parse_axes(text)
    array = make(axes)
    (shard,) = open_shards(save(tmp_path / "x", array), "features")
    layers = range(SIZES["L"]) if "L" in axes else (0,)
    if shard.read is None and axes[0] == "L":
        with pytest.raises(DataError, match="this format is read in order"):
            as_rows(shard, axes)
        return
    for n in (1, 2, 4, 6, 100):
        whole = np.concatenate(list(as_rows(shard, axes).blocks(n)))
        for layer in layers:
            expected = by_hand(array, axes, layer)
            np.testing.assert_array_equal(whole[:, layer] if "L" in axes else whole, expected)
            if "L" in axes:
                one = as_rows(shard, axes, layer)
                assert one.shape == expected.shape
                np.testing.assert_array_equal(np.concatenate(list(one.blocks(n))), expected)


def test_no_more_is_read_at_a_time_than_was_asked_for(tmp_path):
    (shard,) = open_shards(w.save_npy(tmp_path / "x", make(("L", "B", "T", "D"))), "features")
    for n in range(1, 30):
        assert max(len(b) for b in as_rows(shard, ("L", "B", "T", "D")).blocks(n)) <= n


@pytest.mark.parametrize("text", ["", "D", "T,B,D", "D,N", "N,T,D", "N,N,D", "X,D", "B,D", "L,D"])
def test_axes_that_make_no_rows_are_refused(text):
    with pytest.raises(UsageError, match=r"--axes '.*'; expected N,D  T,D"):
        parse_axes(text)


def found(tmp_path: Path, features: str, others: tuple[int, ...] | None, **options) -> str:
    shards = open_shards(w.save_npy(tmp_path / "x", make(tuple(features))), "features")
    beside = () if others is None else open_shards(w.save_npy(tmp_path / "y", np.zeros(others, int)), "labels")  # fmt: skip
    arguments = {"asked": None, "layers": None} | options
    return ",".join(find_axes(shards, arguments["asked"], beside, arguments["layers"]))


@pytest.mark.parametrize(
    ("features", "others", "axes"),
    [
        ("ND", None, "N,D"), ("BTD", (3, 5), "B,T,D"), ("BTD", (15,), "B,T,D"),
        ("TLD", (5,), "N,L,D"), ("LTD", (5,), "L,N,D"), ("BLTD", (3, 5), "B,L,T,D"),
        ("LBTD", (3, 5), "L,B,T,D"), ("BTLD", (3, 5), "B,T,L,D"), ("LBTD", (15,), "L,B,T,D"),
    ],
)  # fmt: skip
def test_axes_are_seen_from_the_labels_where_one_reading_fits(tmp_path, features, others, axes):
    assert found(tmp_path, features, others) == axes


def test_axes_that_are_not_clear_are_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"shape \(3, 5, 6\), which can be read in several") as e:
        found(tmp_path, "BTD", None)
    assert str(e.value).endswith(
        "--axes B,T,D, --axes T,L,D, --axes L,T,D, --axes N,L,D, --axes L,N,D "
        "(B sequences, T positions, L layers)"
    )
    with pytest.raises(DataError, match=r"the \(8,\) of '.*' do not fit"):
        found(tmp_path, "BTD", (8,))
    with pytest.raises(DataError, match="3 axes, as in --axes B,T,D"):
        found(tmp_path, "ND", None, asked="B,T,D")
    square = open_shards(w.save_npy(tmp_path / "z", np.zeros((4, 4, 2))), "features")
    labels = open_shards(w.save_npy(tmp_path / "y", np.zeros(4, int)), "labels")
    with pytest.raises(DataError, match="which can be read in several ways"):
        find_axes(square, None, labels, None)


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    (shard,) = open_shards(w.save_npy(tmp_path / "x", make(("T", "L", "D"))), "features")
    with pytest.raises(UsageError, match="--layer-index 4; expected 0 to 3"):
        as_rows(shard, ("T", "L", "D"), 4)
