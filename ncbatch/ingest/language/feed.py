"""What a language model is fed: the batches of a rank, as the dump takes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError
from ncbatch.ingest.language.corpus import Corpus, TokenBatch
from ncbatch.ingest.language.model import LanguageModel
from ncbatch.store.commit_records import Share

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
