"""Whether the linear module that a model calls its head gives its logits, and what is added outside of it."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ncbatch.ingest.capture import device_of
from ncbatch.ingest.language.model import LanguageModel

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ncbatch")

_PROBE_TOKENS = 16
_ROUNDINGS = 64  # a cap or a scale of logits rounds several times


def with_checked_head(model: LanguageModel) -> LanguageModel:
    """Compare the outputs of the head with the logits of the model, for a few tokens.

    Parameters
    ----------
    model : LanguageModel
        The model.

    Returns
    -------
    LanguageModel
        The model as it is where the head's outputs are the logits, or rank the classes of each row
        alike (scaled or capped logits); with the bias that is added outside of the head; or, with
        a warning, without a head.
    """
    import torch

    if model.head is None:
        return model
    if not isinstance(model.module.get_submodule(model.head), torch.nn.Linear):
        return _without_head(model, "is no torch.nn.Linear")
    outputs, logits = _run(model)
    if len(outputs) != 1:
        return _without_head(model, "runs never or several times in a pass")
    if logits is None:
        return model  # nothing to compare with
    found = outputs[0].to(logits.device)  # of several, where the model is spread over GPUs
    if found.shape != logits.shape:
        return _without_head(model, "does not give the logits")
    if torch.equal(found, logits):
        return model
    bias = _outside(model.module, found, logits)
    if bias is not None:
        return replace(model, head_bias=bias)
    if _rank_alike(found, logits):
        return model
    return _without_head(model, "does not give the logits")


def _run(model: LanguageModel) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Give what the head gave, call by call, and the logits."""
    import torch

    outputs: list[torch.Tensor] = []
    assert model.head is not None
    module = model.module
    modes = [(part, part.training) for part in module.modules()]
    # A copy: the model may work in place on what its head gave.
    handle = module.get_submodule(model.head).register_forward_hook(
        lambda _, __, out: outputs.append(out.clone())
    )
    ids = torch.tensor([_ids(model)], device=device_of(module))
    takes = inspect.signature(module.forward).parameters
    cache = {"use_cache": False} if "use_cache" in takes else {}
    try:
        module.eval()
        with torch.no_grad():
            out: Any = module(input_ids=ids, attention_mask=torch.ones_like(ids), **cache)
    finally:
        handle.remove()
        for part, mode in modes:
            part.training = mode
    return outputs, getattr(out, "logits", None)


def _ids(model: LanguageModel) -> list[int]:
    """Choose tokens from all over the vocabulary; special ones may ask for more than text."""
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    n = min(model.n_tokens, model.n_embeddings)
    step = max(n // (2 * _PROBE_TOKENS), 1)
    ids = [i for i in range(0, n, step) if i not in special] or [0]
    return ids[:: max(len(ids) // _PROBE_TOKENS, 1)][: min(_PROBE_TOKENS, model.context(None))]


def _outside(module: Any, found: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
    """Find the parameter or buffer that was added to the head's outputs."""
    import torch

    for tensors in (module.parameters(), module.buffers()):
        for values in tensors:
            if tuple(values.shape) != tuple(logits.shape[-1:]) or not values.is_floating_point():
                continue
            added = found + values.detach().to(found.device)
            if added.dtype == logits.dtype and torch.equal(added, logits):
                return values.detach()
    return None


def _rank_alike(found: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the logits of each row grow with the outputs, and the same class wins."""
    import torch

    order = found.argsort(-1)
    sorted_logits = logits.gather(-1, order).float()
    unit = torch.finfo(logits.dtype).eps * logits.abs().amax(-1, keepdim=True).float()
    if not bool((sorted_logits.diff(dim=-1) >= -_ROUNDINGS * unit).all()):
        return False
    return bool(torch.equal(found.argmax(-1), logits.argmax(-1)))


def _without_head(model: LanguageModel, why: str) -> LanguageModel:
    logger.warning(
        "module '%s' of %s %s: no classifier is stored, NC3 and NC4 are left out",
        model.head, model.name, why,
    )  # fmt: skip
    return replace(model, head=None)
