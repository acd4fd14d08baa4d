"""From a language model and texts to a store of hidden states."""

from __future__ import annotations

import errno
import inspect
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast

import numpy as np
import numpy.typing as npt

from ncbatch.engine.jobs import Progress
from ncbatch.engine.options import takes
from ncbatch.errors import BudgetError, DataError, OutputError, StoreError, UsageError
from ncbatch.ingest.language.corpus import Corpus, TokenBatch, open_corpus
from ncbatch.ingest.language.model import LanguageModel, open_language_model, with_checked_head
from ncbatch.ingest.language.options import DumpRequest
from ncbatch.ingest.language.places import choose_places, probe
from ncbatch.ingest.language.texts import Texts
from ncbatch.ingest.model.capture import device_of
from ncbatch.ingest.model.dumps import dump, make_target
from ncbatch.ingest.model.places import Place
from ncbatch.ingest.model.ranks import complete_resumed, finalize_if_last
from ncbatch.ingest.model.room import check_rows_room, check_states_room
from ncbatch.ingest.model.target import Request, one_dtype, open_if_there, stored_dtypes
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.format import check_name
from ncbatch.store.ranks import Share

if TYPE_CHECKING:
    import torch

    from ncbatch.ingest.language.option_types import DumpOptions


# What a language model is fed: the batches of a rank, as the dump takes them.


_PROBE_TOKENS = 16


class Feed:
    """The batches of a rank, as `dump` takes them; counts the tokens that the model read.

    Attributes
    ----------
    n_samples : int
        Samples of a rank, about.
    n_tokens : int
        Tokens read by the model so far.

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
        if corpus.kind != "argmax":
            corpus.label_counts(model.n_tokens)  # refuses labels that are no classes
        if corpus.n_token_ids > model.n_embeddings:
            raise DataError(
                f"token id {corpus.n_token_ids - 1} in the texts",
                f"ids below {model.n_embeddings}, the rows of the input embedding",
                "give the tokenizer that the model was trained with (--tokenizer, tokenizer=)",
            )
        self._batches = corpus.batches(batch_size)
        self._model, self._share, self._current = model.module, share, 0
        self._takes = inspect.signature(model.module.forward).parameters
        self.n_samples = -(-corpus.n_samples // share.world_size)
        self.n_tokens = 0

    def example(self) -> dict[str, Any]:
        """Give a few tokens as the model takes them."""
        batch = self._batches[0]
        row = int(np.argmax(batch.attention_mask.sum(1)))
        tokens = np.flatnonzero(batch.attention_mask[row])[:_PROBE_TOKENS]
        return self._inputs(
            batch.input_ids[None, row, tokens], batch.attention_mask[None, row, tokens]
        )

    def __iter__(self) -> Iterator[tuple[dict[str, Any], npt.NDArray[np.int64]]]:
        handle = self._model.register_forward_pre_hook(self._count)
        try:
            for number in range(self._share.rank, len(self._batches), self._share.world_size):
                batch: TokenBatch = self._batches[number]
                self._current = int(batch.attention_mask.sum())
                yield self._inputs(batch.input_ids, batch.attention_mask), batch.labels
        finally:
            handle.remove()

    def _count(self, *_: Any) -> None:
        self.n_tokens += self._current

    def _inputs(
        self, input_ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        return inputs


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
    asked = DumpRequest.of(options)
    moments, means, overwrite = asked.moments, asked.means, asked.overwrite
    if means is not None and not moments:
        raise UsageError(f"means '{means}' without moments", "--moments (moments=True) too")
    share = _share(asked.rank, asked.world_size)
    lm = open_language_model(
        model,
        asked.tokenizer,
        revision=asked.revision,
        model_dtype=asked.model_dtype,
        device=asked.device,
        rank=asked.rank,
        trust_remote_code=asked.trust_remote_code,
        allow_pickle=asked.allow_pickle,
    )
    with _full_named(store):
        lm = with_checked_head(lm)
    lm.check_vocabulary()
    kind = _labels(asked.labels, lm)
    places = choose_places(lm, [asked.layers] if isinstance(asked.layers, str) else asked.layers)
    called = asked.name or lm.name
    step = lm.step if asked.step is None else asked.step
    opened = open_if_there(store)
    if opened is not None:
        _check_described(opened, split, called, step, overwrite)
    stored_dtype = _stored_dtype(opened, split, places, lm, asked.dtype, moments, overwrite)
    how: dict[str, Any] = {
        "moments": moments,
        "means": means,
        "resume": asked.resume,
        "overwrite": overwrite,
    }
    complete = _complete(store, split, places, stored_dtype, lm.n_tokens, share, **how)
    if complete is not None:
        _note(progress, complete_resumed(complete, split, share))
        return complete
    corpus = open_corpus(
        texts,
        lm.tokenizer,
        context=lm.context(asked.context),
        labels=kind,
        pack=asked.pack,
        field=asked.field,
        exclude=asked.exclude,
        max_tokens=asked.max_tokens,
        per_class_cap=asked.per_class_cap,
        seed=asked.seed,
        masked=lm.masked,
        progress=progress,
    )
    feed = Feed(lm, corpus, asked.batch_size, share)
    identity: dict[str, str | int] = {
        "model": called,
        "model dtype": lm.dtype,
        "labels": kind,
        "texts and windows": corpus.fingerprint[:12],
        "batch size": asked.batch_size,
    }
    with _full_named(store):
        seen = probe(lm, places, feed.example(), device_of(lm.module))
    if not moments:
        n = corpus.n_samples
        said = check_rows_room(store, split, seen.widths, stored_dtype, n, overwrite)
        _note(progress, said)
    else:
        n, n_classes = corpus.n_samples, lm.n_tokens
        # Which classes the model will decide for is not known.
        n_seen = n_classes
        if kind != "argmax":
            n_seen = int((corpus.label_counts(n_classes) > 0).sum())
        said = check_states_room(store, split, seen.widths, n_seen, n, share.world_size)
        _note(progress, said)
    with _running(progress, feed, split), _full_named(store):
        done = dump(
            lm.module, feed, store, split, list(places), head=lm.head or False,
            head_bias=lm.head_bias, identity=identity, n_classes=lm.n_tokens, dtype=stored_dtype, argmax_labels=kind == "argmax",
            rank=share.rank, world_size=share.world_size, n_samples=corpus.n_samples,
            progress=progress, **how,
        )  # fmt: skip
        if share.rank == 0:  # what all would say alike, written once
            done.describe(model=called, step=step, layers=seen.notes)
        if share.several:
            finalize_if_last(done, split)
    return done


def _check_described(
    store: FeatureStore, split: str, model: str, step: int | None, overwrite: bool
) -> None:
    """Refuse another model or step than the store's: its name would then be given to all splits."""
    if overwrite and {split} >= {*store.splits, *store.state_splits}:
        return
    for what, recorded, ours in (("model", store.model, model), ("step", store.step, step)):
        if recorded is not None and recorded != ours:
            raise StoreError(
                f"{store.path} holds features of {what} {recorded}",
                f"those of {what} {'unknown' if ours is None else ours}, as this dump would store",
                f"use a store per checkpoint, or say --{'name' if what == 'model' else 'step'} {recorded}",
            )


def _stored_dtype(
    store: FeatureStore | None,
    split: str,
    places: Mapping[str, Place],
    model: LanguageModel,
    asked: str | None,
    moments: bool,
    overwrite: bool,
) -> str:
    """Choose how all layers are stored: as asked, as the store has them, or by the model's dtype."""
    default = "bfloat16" if model.dtype == "bfloat16" else "float16"
    if moments:
        return asked or default
    return one_dtype(stored_dtypes(store, split, places, asked, default, overwrite=overwrite))


def _share(rank: int | None, world_size: int | None) -> Share:
    """Take rank and number of ranks as given, else from torchrun."""
    if (rank is None) != (world_size is None):
        raise UsageError(
            "rank without world size" if world_size is None else "world size without rank",
            "both, or none of them",
        )
    if rank is not None and world_size is not None:
        return Share(rank, world_size)
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return Share(*map(int, found)) if all(text.isdecimal() for text in found) else Share()


def _labels(labels: str | None, model: LanguageModel) -> Literal["next", "given", "argmax"]:
    kind = labels or ("argmax" if model.masked else "next")
    if kind == "argmax" and model.head is None:
        raise UsageError(
            f"labels 'argmax' of {model.name}, which has no head", "labels 'next' or 'given'"
        )
    return cast('Literal["next", "given", "argmax"]', kind)


def _complete(
    store: FeatureStore | str | os.PathLike[str],
    split: str,
    places: Mapping[str, Place],
    dtype: str,
    n_classes: int,
    share: Share,
    *,
    moments: bool,
    means: str | None,
    resume: bool,
    overwrite: bool,
) -> FeatureStore | None:
    """Give the store if nothing is left to resume; refuse what `dump` would, before texts are read."""
    request = Request(
        store, split, places, dtype, n_classes, share, 1, resume=resume, overwrite=overwrite
    )
    target = make_target(request, moments=moments, means=means)
    described = target.done and places.keys() <= target.opened.layer_notes.keys()
    return target.opened if described else None


@contextmanager
def _running(progress: Progress | None, feed: Feed, split: str) -> Iterator[None]:
    """Show the pass, and say how fast it was."""
    start = time.perf_counter()
    with ExitStack() as shown:
        if progress is not None:
            progress.begin(f"dump {split}", feed.n_samples, "rows")
            shown.callback(progress.end)
        yield
    seconds = time.perf_counter() - start
    if feed.n_tokens:
        _note(
            progress,
            f"{feed.n_tokens:,} tokens in {seconds:,.1f} s: {feed.n_tokens / seconds:,.0f} tokens/s",
        )


def _note(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress.note(text)


@contextmanager
def _full_named(store: FeatureStore | str | os.PathLike[str]) -> Iterator[None]:
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
