"""What DumpRequest may be made of. Made by ``python -m tests.generated``."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict

class DumpOptions(TypedDict, total=False):
    layers: str | Sequence[str] | None
    labels: Literal["next", "given", "argmax"] | None
    context: int | None
    batch_size: int
    pack: bool
    field: str
    exclude: Iterable[int]
    max_tokens: int | None
    per_class_cap: int | None
    seed: int
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None
    device: str | None
    rank: int | None
    world_size: int | None
    moments: bool
    means: str | None
    name: str | None
    step: int | None
    revision: str | None
    tokenizer: Any
    trust_remote_code: bool
    allow_pickle: bool
    resume: bool
    overwrite: bool
