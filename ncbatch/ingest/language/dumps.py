"""From a language model and texts to a store of hidden states."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from ncbatch.engine.jobs import Progress, Silent, counted
from ncbatch.engine.options import takes
from ncbatch.errors import BudgetError, DataError, OutputError, StoreError, UsageError
from ncbatch.ingest.language.corpus import Corpus, open_corpus
from ncbatch.ingest.language.model import LanguageModel, open_language_model, with_checked_head
from ncbatch.ingest.language.options import DumpRequest
from ncbatch.ingest.language.places import choose_places, probe
from ncbatch.ingest.language.texts import Texts
from ncbatch.ingest.model.capture import device_of
from ncbatch.ingest.model.dumps import dump, make_target
from ncbatch.ingest.model.ranks import complete_resumed, finalize_if_last
from ncbatch.ingest.model.room import rows_room, states_room
from ncbatch.ingest.model.target import Request, open_if_there, stored_dtype
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.format import check_name
from ncbatch.store.ranks import Share

if TYPE_CHECKING:
    import torch

    from ncbatch.ingest.language.option_types import DumpOptions


_PROBE_TOKENS = 16

# Which options are whose: of the model, of the corpus, of `dump`.
_LOADING = (
    *("tokenizer", "revision", "model_dtype", "device", "rank"),
    *("trust_remote_code", "allow_pickle"),
)
_CHOOSING = ("pack", "field", "exclude", "max_tokens", "per_class_cap", "seed")
_KEEPING = ("moments", "means", "resume", "overwrite")


class Feed:
    """The batches of a rank, as `dump` takes them; counts the tokens that the model read.

    Attributes
    ----------
    n_samples : int
        Samples of a rank, about.
    n_tokens : int
        Tokens read by the model so far.
    n_seen : int
        Classes with samples; all where the model has yet to decide them.

    Parameters
    ----------
    model : LanguageModel
        Who reads them.
    corpus : Corpus
        What is read.
    batch_size : int
        Windows per batch.
    share : Share
        Which batches: r, r + R, ... of all, so that none depends on how many ranks there are.
    """

    def __init__(self, model: LanguageModel, corpus: Corpus, batch_size: int, share: Share) -> None:
        self.n_seen = model.n_tokens
        if corpus.kind != "argmax":  # refuses labels that are no classes
            self.n_seen = int(np.count_nonzero(corpus.label_counts(model.n_tokens)))
        if corpus.n_token_ids > model.n_embeddings:
            raise DataError(
                f"token id {corpus.n_token_ids - 1} in the texts",
                f"ids below {model.n_embeddings}, the rows of the input embedding",
                "give the tokenizer that the model was trained with (--tokenizer, tokenizer=)",
            )
        self._corpus = corpus
        self._batch_size = batch_size
        self._model = model
        self._share = share
        self._current = 0
        self.n_samples = -(-corpus.n_samples // share.world_size)
        self.n_tokens = 0

    def example(self) -> dict[str, Any]:
        """Take a few tokens of the longest window of the first batch, as the model takes them."""
        batch = next(self._corpus.batches(self._batch_size))
        row = int(np.argmax(batch.attention_mask.sum(1)))
        tokens = np.flatnonzero(batch.attention_mask[row])[:_PROBE_TOKENS]
        ids = batch.input_ids[None, row, tokens]
        return self._model.inputs(ids, np.ones_like(ids))

    def __iter__(self) -> Iterator[tuple[dict[str, Any], npt.NDArray[np.int64]]]:
        share = self._share
        # Batches that are skipped, because their rows are stored, are no tokens that it read.
        with self._model.module.register_forward_pre_hook(self._count):
            for batch in self._corpus.batches(self._batch_size, share.rank, share.world_size):
                self._current = int(batch.attention_mask.sum())
                yield self._model.inputs(batch.input_ids, batch.attention_mask), batch.labels

    def _count(self, *_: Any) -> None:
        self.n_tokens += self._current


@takes(DumpRequest)
def dump_language_model(
    model: str | os.PathLike[str] | torch.nn.Module,
    texts: Texts,
    store: FeatureStore | str | os.PathLike[str],
    split: str = "train",
    *,
    progress: Progress | None = None,
    **options: Unpack[DumpOptions],
) -> FeatureStore:
    """Run a causal or masked language model over texts and store its hidden states.

    One forward pass per batch feeds all layers. The store's classes are the token ids of the
    tokenizer. What is stored are the model's own values, cast to `dtype`; where the head's input
    is among the layers its weight (and bias) become the classifier, and the arg-max of its
    logits the predictions.

    Parameters
    ----------
    model : path, str or torch.nn.Module
        A folder, a name on the Hugging Face hub, or a model of transformers that is loaded; then
        `tokenizer` is needed, and the model stays where it is.
    texts : path or sequence of paths
        Text files, JSON lines or ``datasets`` folders, as `open_corpus` takes them.
    store : FeatureStore or path
        Where to write; a path where nothing is becomes a new store.
    split : str, optional
        A new split, or a complete one that lacks all of `layers`: then they are added to it.
    progress : Progress, optional
        Told how far the dump is, and of its size and speed.

    Returns
    -------
    FeatureStore
        The store, with model, step and notes of the layers.

    Raises
    ------
    UsageError
        When transformers is missing, or options make no sense.
    DataError
        When the model, tokenizer or texts cannot be read or do not fit together.
    UnknownNameError
        When a layer does not exist.
    OutputError
        When there is not, or no longer, room on the disk.
    BudgetError
        When the model or a batch does not fit into the memory of its GPU.
    StoreError
        When the split exists, and nothing says what to do with it; when the store holds features
        of another model or step, or the split was begun with other texts or options.
    """
    check_name("split", split)
    progress = progress or Silent()
    asked = DumpRequest.of(options)
    if asked.means is not None and not asked.moments:
        raise UsageError(f"means '{asked.means}' without moments", "--moments (moments=True) too")
    share = _share(asked.rank, asked.world_size)
    lm = open_language_model(model, **_pick(asked, _LOADING))
    # The first forward pass: what the device has no room for shows here.
    with _naming_what_is_full(store):
        lm = with_checked_head(lm)
    lm.check_vocabulary()
    lm = replace(lm, name=asked.name or lm.name, step=lm.step if asked.step is None else asked.step)
    kind = asked.labels or ("argmax" if lm.masked else "next")
    if kind == "argmax" and lm.head is None:
        raise UsageError(
            f"labels 'argmax' of {lm.name}, which has no head", "labels 'next' or 'given'"
        )
    places = choose_places(lm, [asked.layers] if isinstance(asked.layers, str) else asked.layers)
    opened = open_if_there(store)
    _check_described(opened, split, lm, asked.overwrite)
    dtype = _stored_dtype(opened, split, places, lm, asked)
    request = Request(
        store,
        split,
        places,
        dtype,
        lm.n_tokens,
        share,
        n_samples=1,  # not known yet
        resume=asked.resume,
        overwrite=asked.overwrite,
    )
    # What `dump` would refuse is refused before texts are read.
    target = make_target(request, moments=asked.moments, means=asked.means)
    if target.done and places.keys() <= target.opened.layer_notes.keys():
        progress.note(complete_resumed(target.opened, split, share))
        return target.opened
    corpus = open_corpus(
        texts,
        lm.tokenizer,
        context=lm.context(asked.context),
        labels=kind,
        masked=lm.masked,
        progress=progress,
        **_pick(asked, _CHOOSING),
    )
    feed = Feed(lm, corpus, asked.batch_size, share)
    with _naming_what_is_full(store):
        widths, notes = probe(lm, places, feed.example(), device_of(lm.module))
    if asked.moments:
        room = states_room(store, split, widths, feed.n_seen, corpus.n_samples, share.world_size)
    else:
        room = rows_room(store, split, widths, dtype, corpus.n_samples, asked.overwrite)
    progress.note(room)
    with _naming_what_is_full(store):
        done = _run(lm, feed, request, corpus, asked, progress)
        if share.rank == 0:  # what all would say alike, written once
            done.describe(model=lm.name, step=lm.step, layers=notes)
        if share.several:
            finalize_if_last(done, split)
    return done


def _run(
    lm: LanguageModel,
    feed: Feed,
    request: Request,
    corpus: Corpus,
    asked: DumpRequest,
    progress: Progress,
) -> FeatureStore:
    """Show the pass, and say how fast it was."""
    with counted(progress, f"dump {request.split}", feed.n_samples, "rows"):
        start = time.perf_counter()
        store = dump(
            lm.module,
            feed,
            request.store,
            request.split,
            list(request.places),
            head=lm.head or False,
            head_bias=lm.head_bias,
            n_classes=lm.n_tokens,
            dtype=request.dtype,
            argmax_labels=corpus.kind == "argmax",
            rank=request.share.rank,
            world_size=request.share.world_size,
            n_samples=corpus.n_samples,
            # Stores record what a dump was begun with under these names: versions before know them.
            identity={
                "model": lm.name,
                "model dtype": lm.dtype,
                "labels": corpus.kind,
                "texts and windows": corpus.fingerprint[:12],
                "batch size": asked.batch_size,
            },
            progress=progress,
            **_pick(asked, _KEEPING),
        )
    seconds = time.perf_counter() - start
    if feed.n_tokens:
        speed = feed.n_tokens / seconds
        progress.note(f"{feed.n_tokens:,} tokens in {seconds:,.1f} s: {speed:,.0f} tokens/s")
    return store


def _pick(asked: DumpRequest, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in names}


def _check_described(
    store: FeatureStore | None, split: str, lm: LanguageModel, overwrite: bool
) -> None:
    """Refuse another model or step than the store's: its name would then be given to all splits."""
    if store is None:
        return
    if overwrite and {split} >= {*store.splits, *store.state_splits}:
        return  # nothing of the other model remains
    for what, recorded, ours in (("model", store.model, lm.name), ("step", store.step, lm.step)):
        if recorded is not None and recorded != ours:
            option = "name" if what == "model" else "step"
            raise StoreError(
                f"{store.path} holds features of {what} {recorded}",
                f"those of {what} {'unknown' if ours is None else ours}, as this dump would store",
                f"use a store per checkpoint, or say --{option} {recorded}",
            )


def _stored_dtype(
    store: FeatureStore | None,
    split: str,
    layers: Iterable[str],
    lm: LanguageModel,
    asked: DumpRequest,
) -> str:
    """Choose how all layers are stored: as asked, as the store has them, or by the model's."""
    # bfloat16 has the range of float32: values of such models may be too large for float16.
    default = "bfloat16" if lm.dtype == "bfloat16" else "float16"
    if asked.moments:
        return asked.dtype or default
    return stored_dtype(store, split, layers, asked.dtype, default, overwrite=asked.overwrite)


def _share(rank: int | None, world_size: int | None) -> Share:
    """Take rank and number of ranks as asked, else from torchrun."""
    if (rank is None) != (world_size is None):
        raise UsageError(
            "rank without world size" if world_size is None else "world size without rank",
            "both, or none of them",
        )
    if rank is not None and world_size is not None:
        return Share(rank, world_size)
    variables = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return Share(*map(int, variables)) if all(map(str.isdecimal, variables)) else Share()


@contextmanager
def _naming_what_is_full(store: FeatureStore | str | os.PathLike[str]) -> Iterator[None]:
    """Turn a disk or a GPU that is full into an error that says how to go on."""
    import torch

    where = store.path if isinstance(store, FeatureStore) else os.fspath(store)
    try:
        yield
    except OSError as error:
        cause: BaseException | None = error
        while isinstance(cause, StoreError):  # which names the place, but not what helps
            cause = cause.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutputError(
            f"no space left for '{where}'; what was written before is intact",
            "",
            "make room, then go on with the same command and --resume (resume=True)",
        ) from error
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            "the GPU has no memory left for a batch",
            "",
            "take a smaller --batch-size or --context (batch_size=, context=)",
        ) from error
