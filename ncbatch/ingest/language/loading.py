"""Loading a causal or masked Hugging Face language model; weights drawn at random never become its head."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncbatch.errors import BudgetError, DataError, NcbatchError, UsageError
from ncbatch.ingest.language.architecture import (
    check_kind,
    has_head,
    head_of,
    kind_of,
    without_random_weights,
)
from ncbatch.ingest.language.model import LanguageModel, is_step, name_of, step_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ncbatch")

MODEL_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Origin:
    """Where a model and its tokenizer come from, and how they are loaded.

    Attributes
    ----------
    path : str
        A local folder, or a name on the Hugging Face hub.
    tokenizer : str
        Where the tokenizer is; mostly `path`.
    revision : str or None
        Branch, tag or commit on the hub.
    model_dtype : str
        One of `MODEL_DTYPES`; auto: as stored.
    device : str
        Where the model goes.
    trust_remote_code : bool
        Run code that comes with the model.
    allow_pickle : bool
        Read weights that are pickled where there are no safetensors.
    """

    path: str
    tokenizer: str
    revision: str | None = None
    model_dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False
    allow_pickle: bool = False


def open_language_model(
    model: str | os.PathLike[str] | torch.nn.Module,
    tokenizer: Any = None,
    *,
    revision: str | None = None,
    model_dtype: str | None = None,
    device: str | None = None,
    rank: int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer, or take loaded ones.

    Parameters
    ----------
    model : path, str or torch.nn.Module
        A folder, a name on the Hugging Face hub, or a model of transformers that is loaded.
    tokenizer : path, str or tokenizer, optional
        Another tokenizer than the model's own; needed for a loaded model.
    rank : int, optional
        Which of several processes this is, where torchrun does not say: it chooses the GPU.
    revision, model_dtype, device, trust_remote_code, allow_pickle
        As `Origin` has them; none of them for a loaded model.

    Returns
    -------
    LanguageModel
        The model, without a head where the checkpoint has no weights for one; a warning says so.

    Raises
    ------
    UsageError
        When transformers is missing, or options make no sense.
    DataError
        When the model or the tokenizer is not there, cannot be read, or is of another kind.
    """
    dtype, where = model_dtype or "auto", device or "auto"
    if dtype not in MODEL_DTYPES:
        raise UsageError(f"model dtype '{dtype}'", "one of: " + ", ".join(MODEL_DTYPES))
    _check_transformers()
    if not isinstance(model, str | os.PathLike):
        given = (revision, trust_remote_code or None, allow_pickle or None)
        if dtype != "auto" or where != "auto" or any(given):
            raise UsageError(
                "a loaded model, and options of loading",
                "the model with the dtype and on the device that it shall have",
            )
        return _taken(model, tokenizer)
    path = os.path.expanduser(os.fspath(model))
    named = isinstance(tokenizer, str | os.PathLike)
    origin = Origin(
        path,
        os.path.expanduser(os.fspath(tokenizer)) if named else path,
        revision,
        dtype,
        _device(where, rank),
        trust_remote_code,
        allow_pickle,
    )
    _check_there(origin.path, "model")
    with _quietly():
        config = _load_config(origin)
        # Before the weights: what is wrong with it shows sooner.
        tokens = tokenizer if tokenizer is not None and not named else _load_tokenizer(origin)
        return _load(origin, config, tokens)


def _check_transformers() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "no transformers here", "", 'pip install "ncbatch[hf]" to run language models'
        ) from error


def _check_there(path: str, what: str) -> None:
    """Tell a path where nothing is from a name on the hub, which has one slash at most."""
    place = Path(path)
    looks_local = place.is_absolute() or path.startswith(".") or len(place.parts) > 2
    checkpoint = place.parent.is_dir() and is_step(place.name)
    if (looks_local or checkpoint) and not place.exists():
        raise DataError(
            f"no {what} at '{path}': nothing is there", "a folder, or a name on the hub"
        )


def _device(device: str, rank: int | None = None) -> str:
    """Choose where the model goes; each of several processes has a GPU of its own."""
    import torch

    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device in ("auto", "cuda") and n:
        asked_rank = "" if rank is None else str(rank)
        local = os.environ.get("LOCAL_RANK") or asked_rank or os.environ.get("RANK") or "0"
        return f"cuda:{int(local) % n}" if local.isdecimal() else "cuda:0"
    if device == "auto":
        return "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device '{device}'", "auto, cpu, cuda or cuda:N") from error
    if asked.type == "cuda" and (asked.index or 0) >= n:
        raise UsageError(f"device '{device}'", f"one of the {n} CUDA devices that torch finds here")
    return device


def _taken(module: Any, tokenizer: Any) -> LanguageModel:
    """Take a model that is loaded as it is."""
    import torch

    if not isinstance(module, torch.nn.Module) or not hasattr(module, "config"):
        raise UsageError(
            f"a model of type {type(module).__name__}",
            "a path, a name on the hub, or a model of transformers",
        )
    if isinstance(tokenizer, str | os.PathLike):
        path = os.path.expanduser(os.fspath(tokenizer))
        with _quietly():
            tokenizer = _load_tokenizer(Origin(path, path))
    if tokenizer is None:
        raise UsageError("a loaded model without tokenizer", "tokenizer=")
    config: Any = module.config
    path = getattr(config, "_name_or_path", "") or ""
    check_kind(config, path or type(module).__name__)
    kind = kind_of((type(module).__name__,), config)
    name = name_of(path) if path else type(module).__name__
    return _warned(
        LanguageModel(module, tokenizer, name, step_of(path), head_of(module), kind == "masked")
    )


def _load_tokenizer(origin: Origin) -> Any:
    from transformers import AutoTokenizer

    _check_there(origin.tokenizer, "tokenizer")
    with _readable("tokenizer", origin.tokenizer, "--tokenizer (tokenizer=) names another one"):
        return AutoTokenizer.from_pretrained(
            origin.tokenizer,
            revision=origin.revision if origin.tokenizer == origin.path else None,
            trust_remote_code=origin.trust_remote_code,
        )


def _load_config(origin: Origin) -> Any:
    from transformers import AutoConfig

    with _readable("model", origin.path):
        config = AutoConfig.from_pretrained(
            origin.path, revision=origin.revision, trust_remote_code=origin.trust_remote_code
        )
    check_kind(config, origin.path)
    return config


def _load(origin: Origin, config: Any, tokenizer: Any) -> LanguageModel:
    """Load the weights, with the class that has the head they were trained with."""
    import transformers

    names = tuple(getattr(config, "architectures", None) or ())
    kind = kind_of(names, config)
    auto: Any = transformers.AutoModel
    if not names or any(map(has_head, names)):
        auto = (
            transformers.AutoModelForMaskedLM
            if kind == "masked"
            else transformers.AutoModelForCausalLM
        )
    with _readable("model", origin.path, _remedy(origin)):
        module, info = auto.from_pretrained(
            origin.path,
            revision=origin.revision,
            trust_remote_code=origin.trust_remote_code,
            **_dtype_option(origin.model_dtype),
            use_safetensors=None if origin.allow_pickle else True,
            output_loading_info=True,
        )
    module = without_random_weights(module, info, origin.path)
    _move(module, origin.device)
    step = step_of(origin.path, origin.revision)
    return _warned(
        LanguageModel(
            module, tokenizer, name_of(origin.path), step, head_of(module), kind == "masked"
        )
    )


def _dtype_option(dtype: str) -> dict[str, Any]:
    """Name the option as this version of transformers does: ``torch_dtype`` before 4.56."""
    import torch
    import transformers

    major, minor = (int(n) for n in transformers.__version__.split(".")[:2])
    value = dtype if dtype == "auto" else getattr(torch, dtype)
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": value}


def _warned(model: LanguageModel) -> LanguageModel:
    if model.head is None:
        logger.warning(
            "%s has no head that was trained: no classifier is stored, NC3 and NC4 are left out",
            model.name,
        )
    return model


def _move(module: Any, device: str) -> None:
    import torch

    try:
        module.to(device)
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"the model does not fit on {device}",
            "",
            "take a smaller model dtype, or load it over several GPUs yourself and give it to "
            "nc.dump_language_model",
        ) from error


def _remedy(origin: Origin) -> str:
    """Say what helps where weights are there, but pickled."""
    if origin.allow_pickle:
        return ""
    place = Path(origin.path)
    if place.is_dir() and (any(place.glob("*.safetensors")) or not any(place.glob("*.bin"))):
        return ""
    return "--allow-pickle (allow_pickle=True) reads pickled weights, from a source you trust"


@contextmanager
def _readable(what: str, path: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever transformers raises for what it cannot load into an error of a line or two."""
    try:
        yield
    except (NcbatchError, MemoryError):
        raise
    except Exception as error:  # it raises kinds of its own, and of the libraries below it
        reason = re.split(r"(?<=\.)\s|\n", str(error).strip())[0].rstrip(".")
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own"
            remedy = (
                "--trust-remote-code (trust_remote_code=True) runs that, from a source you trust"
            )
        elif "couldn't connect" in str(error) or "offline mode" in str(error):
            reason = "it is neither a folder nor on this machine, and the hub cannot be reached"
            remedy = "give the path of a folder, or download it first"
        elif "not a valid model identifier" in str(error):
            reason, remedy = "it is neither a folder nor a name on the hub", ""
        raise DataError(f"{what} '{path}' cannot be loaded: {reason}", "", remedy) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from reporting what is said here, and its bars to terminals."""
    from transformers.utils import logging as reports

    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    if not sys.stderr.isatty():
        reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()
