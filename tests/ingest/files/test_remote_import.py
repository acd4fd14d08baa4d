"""Import into an object store: what arrives, and that nothing is left of what failed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("obstore")

from ncbatch.ingest import import_classifier, import_features
from ncbatch.store import FeatureStore
from tests.conftest import make_toy
from tests.ingest.files.test_imports import Interrupting

# A server of objects takes seconds to start; the store has fast tests with one.
pytestmark = pytest.mark.slow
TOY = make_toy(300)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", 500)
    for name in ("X", "y", "W"):
        np.save(f"{name}.npy", getattr(TOY, name))
    return tmp_path


def test_features_and_classifier_arrive(url):
    assert import_features(url, "train", "h", "X.npy", "y.npy").created
    assert not import_features(url, "train", "h2", "X.npy").created
    import_classifier(url, "h", "W.npy")
    store = FeatureStore.open(url)
    for layer in ("h", "h2"):
        np.testing.assert_array_equal(store.split("train").read(layer, 0, 300), TOY.X)
    np.testing.assert_array_equal(store.split("train").labels(), TOY.y)
    np.testing.assert_array_equal(store.classifier("h")[0], TOY.W)
    assert not [*Path().glob("s3*"), *Path().glob("file*")]


def test_nothing_is_left_of_an_import_that_failed(url, objects):
    with pytest.raises(KeyboardInterrupt):
        import_features(url, "train", "h", "X.npy", "y.npy", progress=Interrupting())
    assert objects.keys(url) == {}
    import_features(url, "train", "h", "X.npy", "y.npy")
    before = objects.keys(url)
    for split, layer in (("test", "h"), ("train", "h2")):
        with pytest.raises(KeyboardInterrupt):
            import_features(url, split, layer, "X.npy", "y.npy", progress=Interrupting())
        assert objects.keys(url).keys() == before.keys()
    assert FeatureStore.open(url).splits == ["train"]
    assert FeatureStore.open(url).layers() == ["h"]
