"""PairStats: equal to K x K grids of the oracle, without holding one."""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest

from ncbatch.arrays.rows import StoredRows
from ncbatch.errors import DataError, UsageError
from ncbatch.states.pairs.stats import PAIR_QUANTITIES, PairStats, Tally
from ncbatch.states.pairs.sweep import PairTiles, sweep_pairs
from tests.libraries import LIBRARIES, NUMPY, Library

# The sweep of NumPy arrays by compiled code is a way of its own, in both dtypes of products.
COMPILED = {"compiled": True}
each_way = pytest.mark.parametrize(
    ("library", "how"),
    [
        *(pytest.param(*p.values, {}, marks=p.marks, id="cupy") if hasattr(p, "marks") else pytest.param(p, {}, id=str(p)) for p in LIBRARIES),
        pytest.param(NUMPY, COMPILED, id="compiled"),
    ],
)  # fmt: skip
each_cpu_way = pytest.mark.parametrize(
    "how", [{}, COMPILED, {**COMPILED, "products": "float32"}], ids=["arrays", "float64", "float32"]
)


def grids(means, center, variances, p=1.0):
    """Every pair's values, from differences."""
    i, j = np.triu_indices(len(means), 1)
    d2 = np.sum((means[i] - means[j]).astype(np.longdouble) ** 2, axis=1)
    u = (means - center) / np.linalg.norm(means - center, axis=1, keepdims=True)
    r = np.sqrt(np.sum((u[i] - u[j]).astype(np.longdouble) ** 2, axis=1))
    s = means.shape[1] - 2
    return {
        "cdnv": (variances[i] + variances[j]) / 2 / d2**p,
        "distance": r,
        "log": -np.log(r),
        "riesz": np.sign(s) * r ** (-float(s)),
        "interference": np.sum((means - center)[i] * (means - center)[j], axis=1),
    }


@each_way
@pytest.mark.parametrize(("K", "D"), [(2, 3), (9, 4), (23, 3), (8, 30)])
@pytest.mark.parametrize("tile", [4, 64])
def test_sweep_equals_the_grids(library: Library, how: dict, K: int, D: int, tile: int):
    rng = np.random.default_rng(K)
    means, V = rng.normal(size=(K, D)) + 3.0, rng.uniform(size=K)
    center = means.mean(axis=0)
    if K == 2:
        center = center + 0.1  # else the two directions are opposite to the last digit
    stats = sweep_pairs(
        library.put(means),
        library.put(center),
        library.put(V),
        dist_exp=2.0,
        tile_classes=tile,
        **how,
    )
    for name, values in grids(means, center, V, 2.0).items():
        tally = getattr(stats, name)
        scale = math.exp(tally.log_scale)
        assert tally.n == K * (K - 1) // 2
        assert tally.mean * scale == pytest.approx(float(values.mean()), rel=1e-9)
        assert tally.variance * scale**2 == pytest.approx(float(values.var()), rel=1e-9, abs=1e-20)


@pytest.mark.parametrize(
    ("gap", "offset"), [(1e-3, 0), (1e-7, 0), (1e-10, 0), (1e-3, 1e4), (1e-6, 1e4)]
)
@each_cpu_way
def test_nearly_coincident_means_keep_their_digits(how: dict, gap: float, offset: float):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(12, 6))
    means[7] = means[3] + gap * rng.normal(size=6)
    means = means + offset
    V = rng.uniform(size=12)
    center = means.mean(axis=0)
    stats = sweep_pairs(means, center, V, tile_classes=5, **how)
    values = grids(means, center, V)
    # The stored means themselves are only so exact: their rounding is not the sweep's.
    tolerance = max(1e-6, 1e-15 * (1 + offset) / gap)
    assert stats.cdnv.mean == pytest.approx(float(values["cdnv"].mean()), rel=tolerance)
    assert stats.log.mean == pytest.approx(float(values["log"].mean()), rel=tolerance)
    assert stats.coincident_means == 0


@each_cpu_way
def test_coincident_means_are_left_out_and_counted(how: dict):
    means = np.random.default_rng(0).normal(size=(6, 4))
    means[5] = means[1]
    V = np.ones(6)
    center = means.mean(axis=0)
    stats = sweep_pairs(means, center, V, **how)
    assert (stats.cdnv.n, stats.coincident_means) == (14, 1)
    assert (stats.log.n, stats.riesz.n, stats.coincident_directions) == (14, 14, 1)
    assert (stats.distance.n, stats.interference.n) == (15, 15)
    assert math.isfinite(stats.cdnv.mean + stats.log.mean + stats.riesz.mean)


@each_cpu_way
def test_a_mean_at_the_center_has_no_direction(how: dict):
    means = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    stats = sweep_pairs(means, 0.0, np.ones(5), **how)
    assert (stats.distance.n, stats.log.n, stats.cdnv.n) == (6, 6, 10)


@each_cpu_way
def test_riesz_energies_beyond_float64_are_tallied_in_logarithms(how: dict):
    rng = np.random.default_rng(0)
    for D in (3000, 20_000):
        means = rng.normal(size=(20, D))
        u = means / np.linalg.norm(means, axis=1, keepdims=True)
        i, j = np.triu_indices(20, 1)
        logs = -(D - 2) * np.log(np.linalg.norm(u[i] - u[j], axis=1))
        tally = sweep_pairs(means, 0.0, quantities=["riesz"], tile_classes=6, **how).riesz
        top = logs.max()
        assert tally.log_abs_mean == pytest.approx(
            top + np.log(np.mean(np.exp(logs - top))), rel=1e-7
        )
        assert tally.log_variance == pytest.approx(
            2 * top + np.log(np.var(np.exp(logs - top))), rel=1e-7
        )


def test_only_what_is_asked_for_is_computed():
    means = np.random.default_rng(0).normal(size=(5, 3))
    stats = sweep_pairs(means, quantities=["log"])
    assert stats.log.n == 10
    assert stats.cdnv == stats.distance == stats.riesz == stats.interference == Tally()
    with pytest.raises(UsageError, match="no pair quantity 'angle'"):
        sweep_pairs(means, quantities=["angle"])
    with pytest.raises(DataError, match="variances"):
        sweep_pairs(means, quantities=["cdnv"])


@each_cpu_way
def test_zero_is_neutral_and_tiles_merge(how: dict):
    rel = 1e-5 if "products" in how else 1e-9
    means = np.random.default_rng(0).normal(size=(9, 3))
    all_of_it = dict(counts=np.full(9, 3), within=np.eye(3), **how)
    stats = sweep_pairs(means, 0.0, np.ones(9), **all_of_it)
    for other in (
        stats.merge(PairStats.zero()),
        PairStats.zero().merge(stats),
        sweep_pairs(means, 0.0, np.ones(9), tile_classes=2, **all_of_it),
    ):
        for f in dataclasses.fields(PairStats):
            assert_same(getattr(other, f.name), getattr(stats, f.name), rel)


@each_way
@pytest.mark.parametrize("tile", [4, 64])
def test_everything_else_equals_loops_over_pairs(library: Library, how: dict, tile: int):
    rng = np.random.default_rng(3)
    K, D = 17, 5
    means, V, n = rng.normal(size=(K, D)) + 1.0, rng.uniform(size=K), rng.integers(1, 9, K)
    A = rng.normal(size=(D, D))
    S, center = A @ A.T, means.mean(axis=0)
    put = library.put
    stats = sweep_pairs(
        put(means), put(center), put(V), counts=put(n), within=put(S), tile_classes=tile, **how
    )
    u = (means - center) / np.linalg.norm(means - center, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    cos = np.array([u[i] @ u[j] for i, j in pairs])
    apart = [means[i] - means[j] for i, j in pairs]
    square = np.array([v @ v for v in apart])
    cdnv = np.array([(V[i] + V[j]) / 2 for i, j in pairs]) / square
    along = np.array([v @ S @ v for v in apart]) / square**2
    corrected = []
    for (i, j), d2 in zip(pairs, square, strict=True):
        if min(n[i], n[j]) > 1:
            vi, vj = (V[c] * n[c] / (n[c] - 1) for c in (i, j))
            left = d2 - vi / n[i] - vj / n[j]
            if left > 0:
                corrected.append((vi + vj) / 2 / left)
    for tally, values in (
        (stats.cosine, cos),
        (stats.deviation, np.abs(cos + 1 / (K - 1))),
        (stats.uniformity, np.exp(-2 * (2 - 2 * cos))),
        (stats.cdnv, cdnv),
        (stats.cdnv_directional, along),
        (stats.cdnv_corrected, np.array(corrected)),
    ):
        assert tally.n == len(values)
        assert tally.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
        assert tally.variance == pytest.approx(values.var(), rel=1e-9, abs=1e-12)
    assert (stats.cosine.minimum, stats.cosine.maximum) == pytest.approx((cos.min(), cos.max()))
    assert stats.deviation.maximum == pytest.approx(np.abs(cos + 1 / (K - 1)).max())
    assert (stats.cdnv.minimum, stats.cdnv.maximum) == pytest.approx((cdnv.min(), cdnv.max()))
    for top, values in ((stats.top_cdnv, cdnv), (stats.top_cosine, cos)):
        order = np.argsort(-values)[: len(top.values)]
        assert len(order) == 10
        np.testing.assert_allclose(top.values, values[order], rtol=1e-9)
        assert [tuple(c) for c in top.classes.tolist()] == [pairs[t] for t in order]
    assert stats.histogram.sum() == len(pairs)
    np.testing.assert_array_equal(stats.histogram, np.histogram(cos, 200, (-1, 1))[0])
    grid = np.sum((means[:, None] - means) ** 2, axis=-1) + np.diag(np.full(K, np.inf))
    np.testing.assert_array_equal(stats.nearest.index, grid.argmin(axis=1))
    np.testing.assert_allclose(stats.nearest.square, grid.min(axis=1), rtol=1e-9)
    angle = 2 - 2 * u @ u.T + np.diag(np.full(K, np.inf))
    np.testing.assert_allclose(stats.nearest.direction_square, angle.min(axis=1), rtol=1e-9)


@each_cpu_way
@pytest.mark.parametrize("D", [1, 2, 5])
def test_extremes_of_energies_are_those_of_the_grids(how: dict, D: int):
    rng = np.random.default_rng(4)
    means = rng.normal(size=(21, D))
    means[9] = means[4]  # a pair without an energy
    stats = sweep_pairs(means, means.mean(axis=0), np.ones(21), tile_classes=8, **how)
    u = (means - means.mean(axis=0)) / np.linalg.norm(means - means.mean(axis=0), axis=1)[:, None]
    i, j = np.triu_indices(21, 1)
    r = np.linalg.norm(u[i] - u[j], axis=1)
    logs = -np.log(r[r > 1e-9])
    energies = np.sign(D - 2) * np.exp((D - 2) * logs)
    for tally, values in (
        (stats.log, logs),
        (stats.riesz, energies),
        (stats.uniformity, np.exp(-2 * r**2)),
    ):
        found = np.array([tally.minimum, tally.maximum]) * math.exp(tally.log_scale)
        np.testing.assert_allclose(found, [values.min(), values.max()], rtol=1e-5, atol=1e-7)
        assert tally.n == len(values)


@each_cpu_way
def test_classes_without_a_variance_are_left_out_of_the_cdnv_alone(how: dict):
    rng = np.random.default_rng(5)
    means, n = rng.normal(size=(14, 4)), rng.integers(1, 3, 14)
    n[:3] = 1
    means[6] = means[1]
    V = np.where(n > 1, rng.uniform(size=14) * n, np.nan)
    stats = sweep_pairs(means, 0.0, V, counts=n, ddof=1, tile_classes=6, **how)
    i, j = np.triu_indices(14, 1)
    d2 = np.sum((means[i] - means[j]) ** 2, axis=1)
    ratios = (V[i] + V[j]) / 2 / d2
    known = ~np.isnan(ratios) & (d2 > 0)
    assert (stats.n_pairs, stats.coincident_means, stats.cdnv.n) == (91, 1, int(known.sum()))
    assert stats.cdnv.mean == pytest.approx(ratios[known].mean(), rel=1e-6)
    assert (stats.cdnv.minimum, stats.cdnv.maximum) == pytest.approx(
        (ratios[known].min(), ratios[known].max()), rel=1e-6
    )
    assert set(n[stats.top_cdnv.classes.ravel()]) == {2}
    plain = sweep_pairs(means, 0.0, np.where(n > 1, V * (n - 1) / n, 0.0), counts=n, **how)
    assert stats.cdnv_corrected.n == plain.cdnv_corrected.n
    assert stats.cdnv_corrected.mean == pytest.approx(plain.cdnv_corrected.mean, rel=1e-9)


@each_cpu_way
def test_coincident_means_are_counted_whatever_is_swept_for(how: dict):
    means = np.random.default_rng(0).normal(size=(40, 3)) + 50.0
    means[33] = means[2]
    for quantity in PAIR_QUANTITIES:
        given = dict(counts=np.full(40, 3), within=np.eye(3), quantities=[quantity])
        stats = sweep_pairs(means, means.mean(axis=0), np.ones(40), tile_classes=16, **given, **how)
        assert (stats.n_pairs, stats.coincident_means) == (780, 1), quantity


@pytest.mark.parametrize("spread", [1e-4, 1.0])
def test_float32_products_keep_six_digits_of_real_looking_means(spread: float):
    rng = np.random.default_rng(0)
    K, D = 400, 96
    # Norms over two decades, a common direction, near-copies: what token embeddings look like.
    means = rng.normal(size=(K, D)) * np.exp(rng.normal(size=(K, 1))) + 5.0 * rng.normal(size=D)
    means[200:250] = means[:50] + spread * 1e-3 * rng.normal(size=(50, D))
    V, center = rng.uniform(size=K), means.mean(axis=0)
    exact = sweep_pairs(means, center, V, compiled=False)
    fast = sweep_pairs(means, center, V, compiled=True, products="float32", tile_classes=128)
    for name in ("cdnv", "distance", "log", "cosine", "deviation", "uniformity"):
        assert getattr(fast, name).mean == pytest.approx(getattr(exact, name).mean, rel=1e-6), name
        assert getattr(fast, name).variance == pytest.approx(
            getattr(exact, name).variance, rel=1e-6
        ), name
    np.testing.assert_array_equal(fast.nearest.index[:50], np.arange(200, 250))


def assert_same(a, b, rel):
    if isinstance(a, np.ndarray):
        np.testing.assert_allclose(a, b, rtol=rel)
    elif dataclasses.is_dataclass(a):
        for f in dataclasses.fields(a):
            if f.name != "log_scale":
                assert_same(getattr(a, f.name), getattr(b, f.name), rel)
    else:
        assert a == pytest.approx(b, rel=rel, abs=1e-15)


@pytest.mark.parametrize("quantity", PAIR_QUANTITIES)
def test_each_quantity_alone_is_what_it_is_among_all(quantity: str):
    rng = np.random.default_rng(1)
    means, V, n = rng.normal(size=(30, 4)), rng.uniform(size=30), rng.integers(2, 9, 30)
    given = dict(counts=n, within=np.eye(4), compiled=True, tile_classes=8)
    alone = sweep_pairs(means, 0.0, V, quantities=[quantity], **given)
    among = sweep_pairs(means, 0.0, V, **given)
    assert_same(getattr(alone, quantity), getattr(among, quantity), 1e-9)
    if quantity != "nearest":
        assert getattr(alone, quantity).n > 400


def in_file(path, values: np.ndarray) -> StoredRows:
    rows = StoredRows.create(path, values.shape)
    rows[0 : len(values)] = values
    return rows


def awkward_means(K: int, D: int) -> np.ndarray:
    """Means far out, some near each other, two that coincide and one at the center."""
    means = np.random.default_rng(0).normal(size=(K, D)) + 1e3
    means[7] = means[3] + 1e-7 * means[0]
    means[K - 1] = means[2]
    means[5] = 0.0
    means[5] = means.sum(axis=0) / (K - 1)
    return means


@each_cpu_way
@pytest.mark.parametrize(("K", "D"), [(45, 6), (20, 33)])
@pytest.mark.parametrize("tile", [8, None])
def test_means_in_a_file_give_what_means_in_memory_give(tmp_path, how, K: int, D: int, tile):
    rng = np.random.default_rng(1)
    means, V, n = awkward_means(K, D), rng.uniform(size=K), rng.integers(1, 9, K)
    given = dict(counts=n, within=np.cov(rng.normal(size=(3 * D, D)).T), tile_classes=tile, **how)
    expected = sweep_pairs(means, means.mean(axis=0), V, **given)
    got = sweep_pairs(in_file(tmp_path / "means", means), means.mean(axis=0), V, **given)
    assert (expected.coincident_means, expected.cdnv.n) == (1, K * (K - 1) // 2 - 1)
    for f in dataclasses.fields(PairStats):
        assert_same(getattr(got, f.name), getattr(expected, f.name), 1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["means"]  # nothing is left beside it


def test_tiles_are_those_of_the_list():
    for K, side in ((30, 512), (2048, 512), (2049, 1024), (5000, 1024)):
        pairs = PairTiles(np.zeros((K, 1)), quantities=[])
        assert list(pairs.tiles()) == PairTiles.tile_list(K)
        assert PairTiles.side(K) == side
        assert PairTiles.tile_list(K)[0] == (slice(0, min(K, side)), slice(0, min(K, side)))
    covered = np.zeros((5000, 5000), bool)
    for rows, columns in PairTiles.tile_list(5000, stored=True):
        covered[rows, columns] = True
    assert covered[np.triu_indices(5000)].all()


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "stored"])
@pytest.mark.parametrize(
    ("K", "D", "quantities"),
    [
        (2500, 300, PAIR_QUANTITIES),
        # Products in float64.
        pytest.param(2500, 3000, ("cdnv", "distance"), marks=pytest.mark.slow),
        pytest.param(1500, 300, PAIR_QUANTITIES, marks=pytest.mark.slow),
        pytest.param(1500, 2000, ("cdnv", "distance"), marks=pytest.mark.slow),
    ],
    ids=["many", "wide", "few", "few-wide"],
)
def test_a_sweep_holds_what_its_price_says(tmp_path, stored: bool, K: int, D: int, quantities):
    rng = np.random.default_rng(0)
    means, V, n, S = rng.normal(size=(K, D)), rng.uniform(size=K), np.full(K, 3), np.eye(D)
    rows = in_file(tmp_path / "means", means) if stored else means
    given = dict(counts=n, within=S, quantities=quantities)
    sweep_pairs(means[:50], 0.0, V[:50], **(given | {"counts": n[:50], "compiled": K > 2048}))
    tracemalloc.start()
    sweep_pairs(rows, means[0], V, **given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    compiler = 288 * 2**20 if K > 2048 else 0  # compiled code is loaded by now
    assert peak < PairTiles.peak_bytes(K, D, quantities, stored=stored) - compiler
