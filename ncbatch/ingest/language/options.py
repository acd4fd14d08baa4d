"""What can be asked of a dump of a language model, declared once; loads no torch and no zarr."""

# Without `from __future__ import annotations`: the annotations are read as the objects they are.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ncbatch.engine.options import Declared, Limits


@dataclass(frozen=True, kw_only=True)
class DumpRequest(Declared):
    """What `dump_language_model` may be asked."""

    layers: Annotated[
        str | Sequence[str] | None,
        "Modules to store, by path, or MODULE:input for what one takes. By default what enters the "
        "first block, what each block gives, and what enters the head: ``model.layers.0:input``, "
        "``model.layers.0``, ..., ``lm_head:input``.",
    ] = None
    labels: Annotated[
        Literal["next", "given", "argmax"] | None,
        "The class of a token: the next one of its document, its label in the text, or the model's "
        "own decision; by default the next, and argmax for a masked model.",
    ] = None
    context: Annotated[
        int | None,
        "Tokens of a window; by default as many as the model takes, 2048 at most.",
        Limits(2),
    ] = None
    batch_size: Annotated[
        int,
        "Windows of a forward pass. It belongs to the result: other batches may give other last "
        "bits.",
        Limits(1),
    ] = 8
    pack: Annotated[
        bool,
        "Fill windows with several documents, as in pretraining; attention then crosses from one "
        "into the next.",
    ] = False
    field: Annotated[str, "Field of JSON lines and data sets that holds the text."] = "text"
    exclude: Annotated[
        Iterable[int], "Token ids that are no labels; not with labels by ``argmax``."
    ] = ()
    max_tokens: Annotated[int | None, "Only the first so many samples.", Limits(1)] = None
    per_class_cap: Annotated[
        int | None,
        "Of every class only so many samples, drawn at random from all texts.",
        Limits(1),
    ] = None
    seed: Annotated[int, "Which draw of those."] = 0
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "float64"] | None,
        "How hidden states are stored; by default as the store has or declares them, else bfloat16 "
        "for a model in bfloat16, float16 for others.",
    ] = None
    model_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        "What the model runs in; ``auto``: as it is stored.",
    ] = "auto"
    device: Annotated[
        str | None,
        "Where the model runs: auto, cpu, cuda or cuda:N; ``auto`` takes a GPU that torch finds.",
    ] = "auto"
    rank: Annotated[
        int | None,
        "Which of several processes this is; by default RANK, as torchrun sets it, or 0. Rank r "
        "takes batches r, r + world size, ... Whichever ends last completes the split.",
        Limits(0),
    ] = None
    world_size: Annotated[
        int | None,
        "How many processes share the work; by default WORLD_SIZE, or 1.",
        Limits(1),
    ] = None
    moments: Annotated[
        bool,
        "Keep no rows but their moments, class by class: measuring takes them as it takes rows.",
    ] = False
    means: Annotated[
        str | None,
        "With `moments`: the split whose class means decide, so that NC4 can be measured too.",
    ] = None
    name: Annotated[str | None, "What results call the model; by default read from its path."] = (
        None
    )
    step: Annotated[
        int | None,
        "Its training step; by default read from its path or revision.",
        Limits(0),
    ] = None
    revision: Annotated[str | None, "Branch, tag or commit on the hub."] = None
    tokenizer: Annotated[
        Any, "Another tokenizer than the model's own: a folder, a hub name, or one that is loaded."
    ] = None
    trust_remote_code: Annotated[bool, "Run code that comes with the model."] = False
    allow_pickle: Annotated[bool, "Read pickled weights where there are no safetensors."] = False
    resume: Annotated[bool, "Go on after an interruption, with the same options."] = False
    overwrite: Annotated[bool, "Replace the split if it is there."] = False
