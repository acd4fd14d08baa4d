"""What kind of model a checkpoint holds, and whether its head was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ncbatch.errors import DataError


def check_kind(config: Any, path: str) -> None:
    """Refuse what reads with an encoder and predicts with a decoder.

    Raises
    ------
    DataError
        Names the model.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(
            f"model '{path}' is an encoder with a decoder", "a causal or a masked language model"
        )


def kind_of(names: tuple[str, ...], config: Any) -> Literal["causal", "masked"]:
    """Say by the names of classes, else by the type of the model, what it predicts."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    for name in names:
        if name.endswith("ForMaskedLM"):
            return "masked"
        if name.endswith(("ForCausalLM", "LMHeadModel")) and "WithLMHead" not in name:
            return "causal"
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    decodes = getattr(config, "is_decoder", False)
    return "masked" if masked and not (causal and decodes) else "causal"


def has_head(name: str) -> bool:
    """Whether a model class of this name ends in logits over tokens."""
    from transformers.models.auto import modeling_auto

    known: set[str] = set()
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    ):
        for names in mapping.values():
            known.update([names] if isinstance(names, str) else names)
    ends = ("ForCausalLM", "ForMaskedLM", "LMHeadModel")  # those that bring their own code
    return name in known or name.endswith(ends)


def without_random_weights(module: Any, info: Mapping[str, Any], path: str) -> Any:
    """Give the model without its head, if the checkpoint lacks weights of that.

    Weights that a checkpoint lacks are drawn at random: as a classifier they would say nothing.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    lacking = set(info["missing_keys"]) & parameters.keys()
    stored = {id(value) for name, value in parameters.items() if name not in lacking}
    lacking = {name for name in lacking if id(parameters[name]) not in stored}  # not tied
    base = module.base_model
    inside = {id(value) for value in base.parameters()}
    broken = sorted(
        name
        for name in lacking
        if id(parameters[name]) in inside and "pooler" not in name.split(".")
    )
    if broken:
        raise DataError(
            f"model '{path}' lacks {len(broken)} weights, such as '{broken[0]}'",
            "a checkpoint of the whole model",
        )
    outside = any(id(parameters[name]) not in inside for name in lacking)
    return base if outside else module


def head_of(module: Any) -> str | None:
    """Find the path of the module that gives the logits."""
    head = module.get_output_embeddings()
    if head is None:
        return None
    return next((path for path, found in module.named_modules() if found is head), None)
