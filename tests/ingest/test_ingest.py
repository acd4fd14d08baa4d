"""The names of ncbatch.ingest, which are resolved when they are used."""

from __future__ import annotations

import pytest

from ncbatch import ingest


def test_every_name_is_there():
    assert {name for name in ingest.__all__ if callable(getattr(ingest, name))} == set(
        ingest.__all__
    )
    assert ingest.__all__ == sorted(ingest._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'dmp'"):
        ingest.dmp  # noqa: B018
