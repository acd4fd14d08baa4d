"""Rows that are never held whole give the blocks that arrays in memory give."""

import pickle
import tracemalloc

import numpy as np
import pytest

from ncbatch.arrays.namespace import namespace
from ncbatch.arrays.rows import (
    CentredRows,
    ChosenRows,
    StoredRows,
    block_rows,
    float64_blocks,
    mean_of_rows,
    product_rows,
    row_blocks,
    symmetric_product,
    take_rows,
    triangular_factor,
)
from ncbatch.errors import DataError
from tests.libraries import Library, each_library

ROWS = np.random.default_rng(0).normal(size=(50, 7)) + 3.0
PARTS = [
    slice(0, 50),
    slice(10, 13),
    slice(5, 5),
    np.array([3]),
    np.arange(20, 31),
    np.array([4, 6, 7]),
    np.array([49, 0, 49, 7]),
    np.array([30, 29, 28]),
    np.empty(0, np.int64),
]
each_part = pytest.mark.parametrize("part", PARTS, ids=str)


@pytest.fixture
def stored(tmp_path) -> StoredRows:
    rows = StoredRows.create(tmp_path / "rows", ROWS.shape)
    for part in (slice(0, 20), slice(20, 50)):
        rows[part] = ROWS[part]
    return rows


@each_part
def test_stored_rows_are_what_was_written(stored: StoredRows, part):
    np.testing.assert_array_equal(stored[part], ROWS[part])
    np.testing.assert_array_equal(stored[part, :], ROWS[part])
    np.testing.assert_array_equal(take_rows(stored, part), ROWS[part])
    again = pickle.loads(pickle.dumps(stored))
    np.testing.assert_array_equal(again[part], ROWS[part])


def test_what_was_not_written_is_zero_and_what_is_missing_is_an_error(tmp_path):
    rows = StoredRows.create(tmp_path / "rows", (4, 3))
    rows[1:2] = np.ones((1, 3))
    assert rows[0:4].sum(axis=1).tolist() == [0, 3, 0, 0]
    with pytest.raises(TypeError, match="slice by slice"):
        rows[np.array([1])] = np.ones((1, 3))
    with pytest.raises(ValueError, match="rows of shape"):
        rows[0:2] = np.ones((1, 3))
    with pytest.raises(TypeError, match="read whole"):
        rows[0:2, 1:2]
    (tmp_path / "rows").write_bytes(b"\0" * 80)
    assert rows[0:3].shape == (3, 3)
    for part in (slice(0, 4), np.array([3])):
        with pytest.raises(DataError, match="cut short"):
            rows[part]


def of_library(part, library: Library):
    return part if isinstance(part, slice) else library.put(part)


@each_part
@each_library
def test_views_equal_arrays(library: Library, part):
    rows, center = library.put(ROWS.astype(np.float32)), library.put(ROWS[0])
    here = of_library(part, library)
    got = library.host(CentredRows(rows, center)[here])
    np.testing.assert_array_equal(got, ROWS.astype(np.float32)[part].astype(np.float64) - ROWS[0])
    assert got.dtype == np.float64
    numbers = np.random.default_rng(1).integers(0, 50, 50)
    for chosen in (numbers, np.sort(numbers), np.arange(50)):
        view = ChosenRows(rows, library.put(chosen))
        assert (view.shape, view.dtype) == ((50, 7), rows.dtype)
        expected = ROWS.astype(np.float32)[chosen][part]
        np.testing.assert_array_equal(library.host(view[here]), expected)
        np.testing.assert_array_equal(library.host(take_rows(view, here)), expected)


@each_part
def test_views_of_stored_rows_and_of_views(stored: StoredRows, part):
    numbers = np.arange(49, -1, -1)
    view = CentredRows(ChosenRows(CentredRows(stored, ROWS[0]), numbers), 1.0, np.float32)
    got = view[part]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, (ROWS[::-1][part] - ROWS[0] - 1.0).astype(np.float32))
    assert namespace(view, ROWS) is namespace(ROWS)
    assert len(view) == 50


@each_library
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_cover_every_row_once(library: Library, dtype):
    values = np.random.default_rng(0).normal(size=(9000, 3)).astype(dtype)
    rows = library.put(values)
    blocks = list(float64_blocks(rows))
    assert [p for p, _ in blocks] == [slice(0, 4096), slice(4096, 8192), slice(8192, 9000)]
    got = np.concatenate([library.host(block) for _, block in blocks])
    np.testing.assert_array_equal(got, values.astype(np.float64))
    np.testing.assert_allclose(
        library.host(mean_of_rows(rows)), values.astype(np.float64).mean(axis=0), atol=1e-13
    )


def test_blocks_are_small_and_products_fold_into_few():
    for n_features in (1, 64, 768, 4096, 16_384, 10**6):
        rows = block_rows(n_features)
        assert rows == 1 or rows * n_features * 8 <= 2 * 2**20
        assert rows <= product_rows(n_features) <= 4096
    assert product_rows(768) == 1536


def test_views_hold_no_rows(tmp_path):
    stored = StoredRows.create(tmp_path / "rows", (20_000, 100))  # 16 MB
    tracemalloc.start()
    view = CentredRows(ChosenRows(stored, np.arange(19_999, -1, -1)), np.ones(100))
    total = sum(float(block.sum()) for _, block in float64_blocks(view))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == -2e6
    assert peak < 8e6


@each_library
def test_symmetric_product_is_symmetric_and_right(library: Library):
    rows = np.random.default_rng(0).normal(size=(50, 6))
    product = library.host(symmetric_product(library.put(rows)))
    np.testing.assert_array_equal(product, product.T)
    np.testing.assert_allclose(product, rows.T @ rows, rtol=1e-14)


@each_library
@pytest.mark.parametrize("n_rows", [3, 10, 45])
def test_triangular_factor_keeps_singular_values(library: Library, n_rows: int):
    rows = np.random.default_rng(1).normal(size=(n_rows, 10)) * np.logspace(0, -9, 10)
    factor = library.host(triangular_factor(library.put(rows), block_rows=10))
    got = np.linalg.svd(factor, compute_uv=False)
    want = np.linalg.svd(rows, compute_uv=False)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-14 * want[0])


def test_row_blocks_cover_everything_once():
    for n, block in ((0, 4), (4, 4), (9, 4)):
        assert [i for part in row_blocks(n, block) for i in range(n)[part]] == list(range(n))
