"""States fed from a training loop: torch tensors of any dtype and layout, and the page that shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.rules import linear_rule, nearest_mean_rule

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "in_loop.md"
K, D, N = 6, 16, 200
RNG = np.random.default_rng(2)
Y = torch.from_numpy(RNG.integers(0, K, N))
X = torch.from_numpy(RNG.normal(size=(N, D)) + 5.0).float()


def naive(x, y):
    """Class means, traces and scatter in float64, class by class."""
    x, y = x.detach().double().numpy(), y.numpy()
    residuals = [x[y == c] - x[y == c].mean(0) for c in range(K)]
    return (
        np.stack([x[y == c].mean(0) for c in range(K)]),
        np.array([(r**2).sum() for r in residuals]),
        sum(r.T @ r for r in residuals),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "grad", "inference"])
def test_tensors_of_any_dtype_and_layout(dtype, layout):
    x, y = X.to(dtype), Y
    if layout == "transposed":
        x = x.T.contiguous().T
        assert not x.is_contiguous()
    elif layout == "strided":
        x, y = x.repeat_interleave(2, 0)[::2], Y.repeat_interleave(3)[::3]
    elif layout == "grad":
        x = (x.requires_grad_() * 1.0).clone()
        assert x.requires_grad
    elif layout == "inference":
        with torch.inference_mode():
            x = x.clone()
    state = nc.Moments.zero(K, D, xp=torch)
    for part in (slice(0, 70), slice(70, N)):
        state = state.merge(nc.Moments.from_block(x[part], y[part], K))
    means, traces, scatter = naive(x, y)
    assert state.means.dtype == torch.float64
    assert not any(value.requires_grad for value in state.to_arrays(host=False).values())
    np.testing.assert_allclose(state.means, means, rtol=1e-12)
    np.testing.assert_allclose(state.traces, traces, rtol=1e-10)
    np.testing.assert_allclose(state.scatter, scatter, rtol=1e-10, atol=1e-9)

    accumulator = MomentsAccumulator(K, D, like=x)
    for part in (slice(0, 70), slice(70, N)):
        accumulator.add(x[part], y[part])
    streamed = accumulator.finish()
    assert not any(value.requires_grad for value in streamed.to_arrays(host=False).values())
    np.testing.assert_allclose(streamed.scatter, scatter, rtol=1e-10, atol=1e-9)


def test_decisions_by_a_module_that_is_trained():
    head = torch.nn.Linear(D, K)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    means = nc.Moments.from_block(X, Y, K).means
    x = (X.requires_grad_() * 1.0).clone()
    rules = nearest_mean_rule(means), linear_rule(head.weight, head.bias)
    by_weights = nc.Decisions.from_block(x, Y, K, *rules)
    by_logits = nc.Decisions.from_block(x, Y, K, rules[0], head(x).argmax(1))
    nearest = torch.cdist(x.double(), means).argmin(1)
    chosen = head(x).argmax(1)
    for state in (by_weights, by_logits):
        assert not any(value.requires_grad for value in state.to_arrays(host=False).values())
        np.testing.assert_array_equal(state.ncc_hits, np.bincount(Y[nearest == Y], minlength=K))
        np.testing.assert_array_equal(
            state.agreements, np.bincount(Y[nearest == chosen], minlength=K)
        )
        np.testing.assert_array_equal(state.clf_hits, np.bincount(Y[chosen == Y], minlength=K))


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, folder: Path) -> str:
    (folder / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py"], cwd=folder, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_pages_training_loop_runs(tmp_path):
    *continued, _ = blocks()
    out = run("".join(continued), tmp_path)
    epochs = [line for line in out.splitlines() if line.startswith("epoch")]
    assert len(epochs) == 5
    first, last = (float(re.search(r"NC1 ([\d.]+)", epochs[i])[1]) for i in (0, -1))
    assert last < first  # it trains, and its classes collapse
    assert "the same" in out
    stored = nc.measure(tmp_path / "run.zarr", ["features"], metrics=["nc1_pinv"])
    nc1 = f"{stored.nc1_pinv.item():.4f}"
    assert f"measured: {nc1}, of the moments themselves: {nc1}" in out


@pytest.mark.slow
def test_the_pages_ranks_give_the_state_of_one_process(tmp_path):
    out = run(blocks()[-1], tmp_path)
    assert "2 ranks: 4000 samples" in out
    merged, one = (np.load(tmp_path / name) for name in ("moments.npz", "one.npz"))
    for name in ("counts", "means", "traces", "scatter"):
        np.testing.assert_allclose(merged[name], one[name], rtol=1e-9, atol=1e-9)
