"""Columns: folders of data sets, and columns that are no arrays, named by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ncbatch.errors import DataError
from ncbatch.ingest.files.layers import open_rows
from tests.ingest.files.formats import writers as w
from tests.ingest.files.formats.writers import make


def test_a_dictionary_of_data_sets_is_answered_with_its_parts(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    part = datasets.Dataset.from_dict({"x": [[1.0, 2.0]]})
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="data sets train, test") as refused:
        open_rows(f"{tmp_path}/d:x")
    assert f"write '{tmp_path}/d/train:COLUMN'" in str(refused.value)
    assert open_rows(f"{tmp_path}/d/train:x").row_shape == (2,)


def test_a_data_set_saved_with_an_order_of_its_own_is_refused(tmp_path):
    source = w.save_dataset(tmp_path / "d", make((6, 2), "float32"))
    state = json.loads((tmp_path / "d/state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]  # as datasets before 2.10 wrote
    (tmp_path / "d/state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"indices mapping[\s\S]*flatten_indices"):
        open_rows(source)


def save_column(path: Path, column: Any) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"x": column}), path)
    return str(path)


COLUMNS = {
    "uneven": ([[1.0, 2.0], [3.0]], r"has 1 values in row 1; expected 2, as in its first row\n.*mask"),
    "null row": ([[1.0, 2.0], None], "has no value in row 1; expected no nulls"),
    "null value": ([[1.0, 2.0], [3.0, None]], "has no value in row 1"),
    "null first": ([None, [1.0, 2.0]], "has no value in row 0; expected no nulls"),
    "empty first": ([[], [1.0, 2.0]], "has 0 values in row 0; expected 2, as in its first row that"),
    "empty for long": ([[]] * 200 + [[1.0, 2.0]], "has 0 values in row 0; expected 2"),
    "empty inside": ([[[], [1.0]], [[3.0], [4.0]]], "has 0 values in row 0; expected 1"),
    "text": (["a", "b"], "holds values of type string; expected numbers, or lists"),
    "uneven inside": ([[[1.0], [2.0]], [[3.0], [4.0, 5.0]]], "has 2 values in row 1; expected 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_that_is_no_array_names_the_row(tmp_path, case):
    column, message = COLUMNS[case]
    source = save_column(tmp_path / "x.parquet", column)
    with pytest.raises(DataError, match=message):
        list(open_rows(source).batches(9))
    if "first" in case or "long" in case:
        assert open_rows(source).row_shape == (2,)
