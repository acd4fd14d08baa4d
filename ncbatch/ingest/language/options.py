"""What can be asked of a dump of a language model, declared once; loads no torch and no zarr."""

# Without `from __future__ import annotations`: the annotations are read as the objects they are.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ncbatch.engine.options import Declared, Limits


@dataclass(frozen=True, kw_only=True)
class DumpRequest(Declared):
    """What `dump_language_model` may be asked.

    Attributes
    ----------
    layers
        Modules to store, by path, or MODULE:input for what one takes. By default what enters
        the first block, what each block gives, and what enters the head:
        ``model.layers.0:input``, ``model.layers.0``, ..., ``lm_head:input``.
    labels
        The class of a token: the next one of its document, its label in the text, or the
        model's own decision; by default the next, and argmax for a masked model.
    context
        Tokens of a window; by default as many as the model takes, 2048 at most.
    batch_size
        Windows of a forward pass. It belongs to the result: other batches may give other last
        bits.
    pack
        Fill windows with several documents, as in pretraining; attention then crosses from one
        into the next.
    field
        Field of JSON lines and data sets that holds the text.
    exclude
        Token ids that are no labels; not with labels by ``argmax``.
    max_tokens
        Only the first so many samples.
    per_class_cap
        Of every class only so many samples, drawn at random from all texts.
    seed
        Which draw of those.
    dtype
        How hidden states are stored; by default as the store has or declares them, else
        bfloat16 for a model in bfloat16, float16 for others.
    model_dtype
        What the model runs in; ``auto``: as it is stored.
    device
        Where the model runs: auto, cpu, cuda or cuda:N; ``auto`` takes a GPU that torch finds.
    rank
        Which of several processes this is; by default RANK, as torchrun sets it, or 0. Rank r
        takes batches r, r + world size, ... Whichever ends last completes the split.
    world_size
        How many processes share the work; by default WORLD_SIZE, or 1.
    moments
        Keep no rows but their moments, class by class: measuring takes them as it takes rows.
    means
        With `moments`: the split whose class means decide, so that NC4 can be measured too.
    name
        What results call the model; by default read from its path.
    step
        Its training step; by default read from its path or revision.
    revision
        Branch, tag or commit on the hub.
    tokenizer
        Another tokenizer than the model's own: a folder, a hub name, or one that is loaded.
    trust_remote_code
        Run code that comes with the model.
    allow_pickle
        Read pickled weights where there are no safetensors.
    resume
        Go on after an interruption, with the same options.
    overwrite
        Replace the split if it is there.
    """

    layers: str | Sequence[str] | None = None
    labels: Literal["next", "given", "argmax"] | None = None
    context: Annotated[int | None, Limits(2)] = None
    batch_size: Annotated[int, Limits(1)] = 8
    pack: bool = False
    field: str = "text"
    exclude: Iterable[int] = ()
    max_tokens: Annotated[int | None, Limits(1)] = None
    per_class_cap: Annotated[int | None, Limits(1)] = None
    seed: int = 0
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = "auto"
    device: str | None = "auto"
    rank: Annotated[int | None, Limits(0)] = None
    world_size: Annotated[int | None, Limits(1)] = None
    moments: bool = False
    means: str | None = None
    name: str | None = None
    step: Annotated[int | None, Limits(0)] = None
    revision: str | None = None
    tokenizer: Any = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    resume: bool = False
    overwrite: bool = False
