"""Chunks of arrays: which are there, which rows they hold, and requests made ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from ncbatch.errors import CorruptionError, StoreError
from ncbatch.store import chunks


@pytest.fixture
def array(tmp_path: Path) -> zarr.Array:
    """Make an array of room for a million rows, of which chunks 0 and 2 are stored."""
    group = zarr.open_group(tmp_path / "g", mode="w")
    made = chunks.create_ids(group, "label", 10**6, 4)
    made[0:4] = 1
    made[8:12] = 2
    return made


def test_chunks_that_are_stored_are_listed(array):
    assert sorted(chunks.stored_chunks(array)) == [0, 2]
    assert np.flatnonzero(chunks.present_chunks(array)).tolist() == [0, 2]


def test_a_missing_chunk_is_named(array):
    with pytest.raises(CorruptionError, match=r"label/c/1 \(rows 4\.\.7\): chunk is missing"):
        chunks.check_present(array)
    stored = np.zeros(250_000, np.bool_)
    stored[[0, 2]] = True
    chunks.check_present(array, stored)


def test_an_array_is_cut_with_its_chunks(array):
    chunks.trim(array, 6)
    assert array.shape == (6,)
    assert chunks.stored_chunks(array) == [0]
    assert chunks.chunk_range(array, 1) == (4, 6)


def test_checksums_follow_the_bytes(array):
    chunks.trim(array, 12)
    before = chunks.checksums(array)
    assert chunks.checksums(array) == before
    array[9] = 3
    assert chunks.checksums(array) != before


def test_an_array_that_is_there_is_found_if_it_is_the_same(array, tmp_path):
    group = zarr.open_group(tmp_path / "g")
    again = chunks.create_ids(group, "label", 10**6, 4)
    np.testing.assert_array_equal(again[8:12], 2)
    with pytest.raises(StoreError, match=r"array 'label' of shape \(1000000,\), chunks \(4,\)"):
        chunks.create_ids(group, "label", 10**6, 8)


def test_a_group_belongs_to_one_of_those_that_make_it(tmp_path):
    group = zarr.open_group(tmp_path / "g", mode="w")
    first = chunks.require_group(group, "a", {"who": 1})
    assert chunks.require_group(group, "a", {"who": 2}).attrs["who"] == first.attrs["who"] == 1
    chunks.create_ids(group, "b", 4, 4)
    with pytest.raises(StoreError, match="'/b' is an array; expected a group"):
        chunks.require_group(group, "b")


@pytest.mark.parametrize("at_once", [1, 3])
def test_results_come_in_order_and_tasks_are_taken_no_further_ahead(at_once):
    taken = []

    def tasks():
        for number in range(10):
            taken.append(number)
            yield number

    for number, result in enumerate(chunks.map_ahead(lambda x: x * x, tasks(), at_once)):
        assert result == number**2
        assert len(taken) <= number + at_once


def test_an_error_of_a_task_ends_the_others():
    def fail(number: int) -> int:
        if number == 1:
            raise StoreError("gone")
        return number

    with pytest.raises(StoreError, match="gone"):
        list(chunks.map_ahead(fail, range(100), 4))
