"""A causal or masked language model: its module, tokenizer, head and vocabulary, and what it is called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncbatch.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

_LONGEST = 2048  # tokens of a window unless asked for: attention over more is seldom wanted
_STEP = re.compile(r"(?:^|[-_./])(?:checkpoint|global_?step|step|iter)[-_]?(\d+)(?![\d.]*[kKmMbB])")
_ONLY_STEP = re.compile(r"(?:checkpoint|global_?step|step|iter)[-_]?\d+")


@dataclass(frozen=True)
class LanguageModel:
    """A language model that is ready to run.

    Attributes
    ----------
    module : torch.nn.Module
        The model.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    name : str
        What results call it.
    step : int or None
        Training step of the checkpoint, where its name tells.
    head : str or None
        Path of the linear module that gives the logits; None where the checkpoint has none.
    masked : bool
        Whether it predicts masked tokens instead of next ones.
    head_bias : torch.Tensor or None
        A bias that the model adds to the head's outputs outside of that module.
    """

    module: torch.nn.Module
    tokenizer: Any
    name: str
    step: int | None
    head: str | None
    masked: bool
    head_bias: torch.Tensor | None = None

    @property
    def config(self) -> Any:
        """The part of the model's configuration that concerns text."""
        config: Any = self.module.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def n_tokens(self) -> int:
        """K: token ids of the tokenizer, from 0 to the largest."""
        ids: dict[str, int] = self.tokenizer.get_vocab()
        return max([len(self.tokenizer), *(i + 1 for i in ids.values())])

    @property
    def n_embeddings(self) -> int:
        """Rows of the input embedding: ids beyond them cannot be read."""
        return int(self.module.get_input_embeddings().weight.shape[0])

    @property
    def dtype(self) -> str:
        """Dtype of the input embedding, which hidden states mostly have."""
        return str(self.module.get_input_embeddings().weight.dtype).removeprefix("torch.")

    def check_vocabulary(self) -> None:
        """Refuse a tokenizer that has ids which the model does not know.

        Raises
        ------
        DataError
            Names both sizes.
        """
        rows, what = self.n_embeddings, "rows of the input embedding"
        if self.head is not None:
            outputs = int(self.module.get_submodule(self.head).weight.shape[0])
            if outputs < rows:
                rows, what = outputs, f"rows of the head '{self.head}'"
        if self.n_tokens > rows:
            raise DataError(
                f"the tokenizer does not match the vocabulary of {self.name}: "
                f"{self.n_tokens:,} token ids, {rows:,} {what}",
                "",
                "give the tokenizer that the model was trained with (--tokenizer, tokenizer=)",
            )

    @property
    def _longest(self) -> int | None:
        """Tokens that the model takes at most, where it says so."""
        longest = getattr(self.config, "max_position_embeddings", None)
        for path, module in self.module.named_modules():
            padding = getattr(module, "padding_idx", None)
            if path.endswith("position_embeddings") and longest is not None and padding is not None:
                return int(longest) - int(padding) - 1  # RoBERTa counts from behind the padding
        return longest

    def context(self, asked: int | None) -> int:
        """Choose the tokens of a window: as asked, else what the model takes, 2048 at most.

        Raises
        ------
        UsageError
            When the model takes fewer.
        """
        longest = self._longest
        if asked is not None:
            if longest is not None and asked > longest:
                raise UsageError(f"context of {asked} tokens", f"{longest} at most, for this model")
            return asked
        known = (longest, getattr(self.tokenizer, "model_max_length", None))
        return min([_LONGEST, *(int(n) for n in known if n)])


def is_step(name: str) -> bool:
    """Whether a folder's name says no more than which checkpoint it is."""
    return _ONLY_STEP.fullmatch(name) is not None


def name_of(path: str) -> str:
    """Name a model by its path; a folder that is but a checkpoint, by the one above.

    Examples
    --------
    >>> name_of("runs/tiny/checkpoint-1000"), name_of("EleutherAI/pythia-70m")
    ('tiny', 'EleutherAI/pythia-70m')
    """
    place = Path(path)
    if not place.exists() and not is_step(place.name):
        return path
    place = place.resolve()
    return place.parent.name if is_step(place.name) else place.name


def step_of(*names: str | None) -> int | None:
    """Read a training step from a path or revision, the first that tells.

    Examples
    --------
    >>> step_of("runs/tiny/checkpoint-1000"), step_of("main", "step143000"), step_of("gpt2")
    (1000, 143000, None)
    """
    for name in names:
        found = _STEP.findall(Path(name).name) if name else []
        if found:
            return int(found[-1])
    return None
