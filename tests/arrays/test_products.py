"""Products over tall arrays."""

import numpy as np
import pytest

from ncbatch.arrays.namespace import first_nonfinite_row
from ncbatch.arrays.rows import row_blocks, symmetric_product, triangular_factor
from tests.libraries import Library, each_library


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


@each_library
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_nonfinite_row(library: Library, bad: float):
    rows = np.zeros((5, 3))
    assert first_nonfinite_row(library.put(rows)) is None
    rows[3, 1] = rows[4, 0] = bad
    assert first_nonfinite_row(library.put(rows)) == 3
