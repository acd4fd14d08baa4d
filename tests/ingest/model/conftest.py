"""What several test files of dumps share: stores of rows and of states."""

from __future__ import annotations

import pytest

from ncbatch.ingest.model import states

# The helpers are imported by the fixtures: without torch the tests are skipped, not broken.


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Rows of train and test, in float32."""
    from tests.ingest.model.folds import other_batches, store_rows

    path = tmp_path_factory.mktemp("rows") / "s.zarr"
    store_rows(path)
    return store_rows(path, other_batches(), "test")


@pytest.fixture(scope="session")
def folded(tmp_path_factory):
    """States of both, with the decisions of test."""
    from tests.ingest.model.folds import fold, other_batches

    path = tmp_path_factory.mktemp("folded") / "s.zarr"
    fold(path)
    return fold(path, other_batches(), "test", means="train")


@pytest.fixture(params=["host", "tensors"])
def place(request, monkeypatch):
    """Fold NumPy arrays, or torch tensors where the features are, as on a GPU."""
    if request.param == "tensors":
        monkeypatch.setattr(states, "choose_place", lambda *_: False)
    return request.param
