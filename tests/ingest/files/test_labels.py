"""Labels: next tokens by hand-written cases, and imports of what language-model tools leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest import import_features
from ncbatch.store import FeatureStore
from tests.conftest import run_here, tree
from tests.ingest.files.formats import writers as w


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(n_rows: int, **options) -> list[int]:
    """Import and give the stored labels."""
    arguments = {"labels": "next", "n_classes": 100, "layer": "h", "features": "x.npy"} | options
    done = import_features("s", "train", **arguments)
    split = FeatureStore.open("s").split("train")
    assert done.features.n_rows == split.n_rows == n_rows
    return split.labels().tolist()


def save(**arrays) -> None:
    for name, values in arrays.items():
        np.save(f"{name}.npy", np.asarray(values))


def features(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)


@pytest.mark.parametrize("read_bytes", [1, 12 * 3, 2**20])
def test_next_tokens_stay_within_their_sequence(monkeypatch, read_bytes):
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", read_bytes)
    save(x=features(2, 4), t=[[5, 6, 7, 8], [1, 2, 3, 4]])
    assert imported(8, tokens="t.npy") == [6, 7, 8, -1, 2, 3, 4, -1]


@pytest.mark.parametrize("read_bytes", [1, 12 * 3, 2**20])
def test_padding_is_no_sample_and_no_next_token(monkeypatch, read_bytes):
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", read_bytes)
    save(
        x=features(3, 4),
        t=[[5, 6, 0, 0], [0, 0, 7, 8], [1, 2, 3, 4]],  # padded right, left, not
        m=[[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]],
    )
    expected = [6, -1, -1, -1, -1, -1, 8, -1, 2, 3, 4, -1]
    assert imported(12, tokens="t.npy", mask="m.npy") == expected


def test_a_loss_mask_is_about_the_token_that_is_predicted():
    save(x=features(1, 5), t=[[10, 11, 12, 13, 14]], m=np.array([[0, 0, 0, 1, 1]], bool))
    assert imported(5, tokens="t.npy", loss_mask="m.npy") == [-1, -1, 13, 14, -1]


def test_ignored_token_ids_are_no_labels():
    save(x=features(1, 4), t=[[10, -100, 12, -100]])
    assert imported(4, tokens="t.npy") == [-1, 12, -1, -1]


def test_documents_that_were_packed_are_not_crossed():
    save(x=features(2, 4), t=[[1, 2, 3, 4], [5, 6, 7, 8]], d=[[0, 0, 1, 1], [1, 2, 2, 2]])
    assert imported(8, tokens="t.npy", documents="d.npy") == [2, -1, 4, -1, -1, 7, 8, -1]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_given_labels_and_masks_take_rows_out(dtype):
    save(x=features(2, 3), y=np.array([[1, 2, 3], [4, 5, 6]], dtype), m=[[1, 1, 0], [1, 0, 1]])
    assert imported(6, labels="y.npy", mask="m.npy") == [1, 2, -1, 4, -1, 6]


def test_a_mask_takes_rows_out_of_outside_data_without_labels():
    save(x=features(2, 3), m=[[1, 1, 0], [1, 0, 1]])
    import_features("s", "ood", "h", "x.npy", axes="B,T,D", mask="m.npy", n_classes=5)
    assert FeatureStore.open("s").split("ood").labels().tolist() == [0, 0, -1, 0, -1, 0]


def test_rows_in_one_axis_need_a_word_about_their_order():
    save(x=features(6), t=[1, 2, 3, 4, 5, 6])
    with pytest.raises(
        DataError, match=r"need not be in the order of the text; expected --axes T,D"
    ) as e:
        imported(6, tokens="t.npy")
    assert "shuffled have lost their next token" in str(e.value)
    assert not Path("s").exists()
    assert imported(6, tokens="t.npy", axes="T,D") == [2, 3, 4, 5, 6, -1]


def test_token_ids_by_sequence_tell_the_order_of_flat_rows():
    save(x=features(6), t=[[1, 2, 3], [4, 5, 6]])
    assert imported(6, tokens="t.npy") == [2, 3, -1, 5, 6, -1]


def test_flat_token_ids_follow_the_sequences_of_the_features():
    save(x=features(2, 3), t=[1, 2, 3, 4, 5, 6])
    assert imported(6, tokens="t.npy", axes="B,T,D") == [2, 3, -1, 5, 6, -1]


def test_sequences_that_differ_are_refused():
    save(x1=features(2), x2=features(4), t1=[1, 2, 3], t2=[4, 5, 6])
    with pytest.raises(DataError, match=r"3 token ids in 't1.npy' for 2 rows in 'x1.npy'"):
        imported(6, features="x*.npy", tokens="t[12].npy", axes="T,D")
    save(x=features(2, 3), t=[[1, 2], [3, 4], [5, 6]])
    with pytest.raises(DataError, match="3 x 2 for features of 2 x 3"):
        imported(6, tokens="t.npy", axes="B,T,D")


@pytest.mark.parametrize("what", ["labels", "predictions", "mask", "loss_mask"])
def test_what_is_transposed_is_refused(what: str):
    save(x=features(6, 4), y=np.zeros((6, 4), int), z=np.ones((4, 6), int))
    sources = {"labels": "y.npy", "axes": "B,T,D"} | {what: "z.npy"}
    with pytest.raises(
        DataError, match=f"{what.replace('_', ' ')} of sequences 4 x 6 for .* 6 x 4"
    ):
        imported(24, **sources)
    assert not Path("s").exists()


@pytest.mark.parametrize("what", ["mask", "loss_mask", "documents"])
def test_marks_have_the_sequences_of_the_tokens(what: str):
    save(x=features(6), f=features(2, 3), t=np.arange(6).reshape(2, 3), z=np.ones((3, 2), int))
    for source in ("x.npy", "f.npy"):
        with pytest.raises(DataError, match="of sequences 3 x 2 for features of 2 x 3"):
            imported(6, features=source, tokens="t.npy", **{what: "z.npy"})


@pytest.mark.parametrize("what", ["labels", "mask", "predictions"])
def test_rows_are_compared_file_by_file(what: str):
    for number, (rows, marks) in enumerate([(4, 2), (2, 4)]):
        np.savez(f"k{number}.npz", h=features(rows), y=np.zeros(rows, int), z=np.ones(marks, int))
        np.save(f"z{number}.npy", np.ones(marks, int))
    for source in (":z", "z?.npy"):
        sources = {"features": "k?.npz:h", "labels": ":y"} | {what: source}
        with pytest.raises(DataError, match=rf"2 {what} in '.0.np.*' for 4 rows in 'k0.npz:h'"):
            imported(6, **sources)
    assert not Path("s").exists()


def test_a_column_of_token_ids_is_no_row_of_sequences():
    save(x=features(4), t=[[1], [2], [3], [4]], m=[[1], [1], [1], [0]])
    with pytest.raises(DataError, match="need not be in the order of the text"):
        imported(4, tokens="t.npy")
    assert imported(4, tokens="t.npy", mask="m.npy", axes="T,D") == [2, 3, -1, -1]


def test_an_import_without_any_sample_is_refused():
    save(x=features(4), y=[-1, -100, -1, -1], z=[0, 1, 2, 3], m=np.zeros(4, int))
    save(b=features(4, 1), t=[[1], [2], [3], [4]])
    for sources in (
        dict(labels="y.npy"),
        dict(labels="z.npy", mask="m.npy"),
        dict(features="b.npy", tokens="t.npy", axes="B,T,D"),
    ):
        with pytest.raises(DataError, match="none of the 4 rows is a sample"):
            imported(4, **sources)
    assert not Path("s").exists()


def test_the_command_line_says_how_many_rows_are_samples(tmp_path: Path):
    save(x=features(4), y=[0, -1, 1, 0], z=[0, 1, 1, 0])
    line = ["import", "--layer", "h", "--features", "x.npy", "--split", "train"]
    done = run_here(*line, "s", "--labels", "y.npy", cwd=tmp_path)
    assert "3 of 4 rows are samples" in done.out
    done = run_here(*line, "again", "--labels", "z.npy", cwd=tmp_path)
    assert done.code == 0
    assert "samples" not in done.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(labels="next"), "--labels next without token ids; expected --tokens"),
        (dict(labels="y.npy", tokens="y.npy"), "--tokens without --labels next"),
        (dict(labels="y.npy", documents="y.npy"), "--documents without --labels next"),
        (
            dict(labels="y.npy", mask="f.npy"),
            r"mask of shape \(6,\), float64; expected integers or booleans of",
        ),
        (dict(labels="y.npy", mask="short.npy"), "5 mask for 6 rows"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(options, message):
    save(x=features(6), y=[0, 1, 0, 1, 0, 1], f=np.ones(6), short=np.ones(5, int))
    before = tree(Path())
    with pytest.raises((UsageError, DataError), match=message):
        imported(6, **options)
    assert tree(Path()) == before


def test_a_mask_is_compared_through_labels_when_a_layer_is_added():
    save(x=features(4), y=[0, 1, 0, 1], m=[1, 1, 0, 1])
    assert imported(4, labels="y.npy", mask="m.npy") == [0, 1, -1, 1]
    with pytest.raises(UsageError, match="a mask without labels for split 'train'"):
        import_features("s", "train", "h2", "x.npy", mask="m.npy")
    with pytest.raises(DataError, match="label 0 in row 2"):
        import_features("s", "train", "h2", "x.npy", "y.npy")
    import_features("s", "train", "h2", "x.npy", "y.npy", mask="m.npy")


# ------------------------------------------------------------------------ files that tools leave


REQUESTS = {"req-2": 5, "req-10": 3, "req-11": 1}


def test_requests_of_vllm_give_all_layers_and_next_tokens():
    """One file per request: hidden_states [T, L, D] in bfloat16, token_ids [T]."""
    import torch
    from safetensors.torch import save_file

    rng = np.random.default_rng(3)
    states, expected = [], []
    for name, length in REQUESTS.items():
        hidden = rng.standard_normal((length, 4, 6)).astype(w.BFLOAT16)
        ids = rng.integers(0, 50, length)
        save_file(
            {"hidden_states": w.to_torch(hidden), "token_ids": torch.from_numpy(ids)},
            f"{name}.safetensors",
        )
        states.append(hidden)
        expected += [*ids[1:].tolist(), -1]
    source = "req-*.safetensors:hidden_states"
    options = {"features": source, "tokens": ":token_ids", "axes": "T,L,D"}
    assert imported(9, layer="h.{}", **options) == expected
    split = FeatureStore.open("s").split("train")
    assert list(split.features) == ["h.0", "h.1", "h.2", "h.3"]
    whole = np.concatenate(states)
    for i in range(4):
        assert split.spec(f"h.{i}").dtype == "bfloat16"
        np.testing.assert_array_equal(split.read(f"h.{i}", 0, 9), whole[:, i].astype(np.float32))


def test_speculators_files_give_a_layer_per_key():
    """One file per sample: hs_0, hs_1, ... [T, D], input_ids and loss_mask [T]."""
    import torch

    rng = np.random.default_rng(3)
    kept: dict[int, list[np.ndarray]] = {2: [], 10: [], 7: []}
    for number in range(3):
        content = {
            "input_ids": torch.arange(4) + 10 * number,
            "loss_mask": torch.tensor([0, 0, 1, 1]),
        }
        for key in kept:
            kept[key].append(rng.standard_normal((4, 3)).astype(np.float16))
            content[f"hs_{key}"] = torch.from_numpy(kept[key][-1])
        torch.save(content, f"data_{number}.pt")
    options = {"features": "data_*.pt:hs_{}", "tokens": ":input_ids", "loss_mask": ":loss_mask"}
    labels = imported(12, layer="block.{}", axes="T,D", **options)
    assert labels == [-1, 2, 3, -1, -1, 12, 13, -1, -1, 22, 23, -1]
    split = FeatureStore.open("s").split("train")
    assert list(split.features) == ["block.2", "block.7", "block.10"]
    for key, parts in kept.items():
        np.testing.assert_array_equal(split.read(f"block.{key}", 0, 12), np.concatenate(parts))


def test_a_cache_of_saelens_gives_its_hooks():
    """A data set of a column per hook, Array2D (context, D), with token ids, shuffled."""
    import datasets

    rng = np.random.default_rng(3)
    hooks = {
        f"blocks.{i}.hook_resid_post": rng.standard_normal((5, 4, 3)).astype("f4") for i in (0, 3)
    }
    ids = rng.integers(0, 50, (5, 4))
    made = datasets.Dataset.from_dict(
        hooks | {"token_ids": ids},
        features=datasets.Features(
            {name: datasets.Array2D((4, 3), "float32") for name in hooks}
            | {"token_ids": datasets.Sequence(datasets.Value("int32"), length=4)}
        ),
    )
    datasets.disable_progress_bars()
    order = np.array([3, 0, 4, 1, 2])
    made.select(order).save_to_disk("cache", num_shards=2)
    labels = imported(
        20, layer="blocks.{}", features="cache:blocks.{}.hook_resid_post", tokens=":token_ids"
    )
    assert labels == np.column_stack([ids[order, 1:], np.full(5, -1)]).ravel().tolist()
    split = FeatureStore.open("s").split("train")
    for i in (0, 3):
        expected = hooks[f"blocks.{i}.hook_resid_post"][order].reshape(20, 3)
        np.testing.assert_array_equal(split.read(f"blocks.{i}", 0, 20), expected)
