"""A causal or masked language model: loaded with its tokenizer, its head found and checked."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncbatch.errors import BudgetError, DataError, NcbatchError, UsageError
from ncbatch.ingest.language.texts import vocabulary_of
from ncbatch.ingest.model.capture import capturing, device_of

if TYPE_CHECKING:
    import torch


logger = logging.getLogger("ncbatch")

_LONGEST = 2048  # tokens of a window unless asked for: attention over more is seldom wanted
# A number of parameters or tokens, such as step-350M, is no step.
_STEP = re.compile(r"(?:^|[-_./])(?:checkpoint|global_?step|step|iter)[-_]?(\d+)(?![\d.]*[kKmMbB])")
_PROBE_TOKENS = 16
_ROUNDINGS = 64  # a cap or a scale of logits rounds several times


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
        return config.get_text_config()

    @property
    def n_tokens(self) -> int:
        """K: token ids of the tokenizer, from 0 to the largest."""
        return vocabulary_of(self.tokenizer)

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
        rows = {"the input embedding": self.n_embeddings}
        if self.head is not None:
            weight = self.module.get_submodule(self.head).weight
            rows[f"the head '{self.head}'"] = int(weight.shape[0])
        fewest = min(rows, key=rows.__getitem__)
        if self.n_tokens > rows[fewest]:
            raise DataError(
                f"the tokenizer does not match the vocabulary of {self.name}: "
                f"{self.n_tokens:,} token ids, {rows[fewest]:,} rows of {fewest}",
                "",
                "give the tokenizer that the model was trained with (--tokenizer, tokenizer=)",
            )

    def inputs(self, ids: Any, mask: Any) -> dict[str, Any]:
        """Name token ids (B, T), and a mask of those to attend to, as the model takes them."""
        # A cache of keys and values would be kept and never used.
        takes = inspect.signature(self.module.forward).parameters
        cache = {"use_cache": False} if "use_cache" in takes else {}
        return {"input_ids": ids, "attention_mask": mask, **cache}

    def context(self, asked: int | None) -> int:
        """Choose the tokens of a window: as asked, else what the model takes, 2048 at most.

        Raises
        ------
        UsageError
            When the model takes fewer.
        """
        longest: int | None = getattr(self.config, "max_position_embeddings", None)
        for path, module in self.module.named_modules():
            padding = getattr(module, "padding_idx", None)
            if path.endswith("position_embeddings") and longest is not None and padding is not None:
                longest -= int(padding) + 1  # RoBERTa counts from behind the padding
                break
        if asked is None:
            known = (longest, getattr(self.tokenizer, "model_max_length", None))
            return min([_LONGEST, *(int(n) for n in known if n)])
        if longest is not None and asked > longest:
            raise UsageError(f"context of {asked} tokens", f"{longest} at most, for this model")
        return asked


def open_language_model(
    model: str | os.PathLike[str] | torch.nn.Module,
    tokenizer: Any = None,
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
    revision : str, optional
        Branch, tag or commit on the hub.
    model_dtype : str, optional
        What it runs in; auto: as stored.
    device : str, optional
        Where the model goes; by default a GPU where there is one.
    rank : int, optional
        Which of several processes this is, where torchrun does not say: it chooses the GPU.
    trust_remote_code, allow_pickle : bool, optional
        Run code that comes with the model; read weights that are pickled where there are no
        safetensors. A loaded model takes these options as little as those before.

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
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "no transformers here", "", 'pip install "ncbatch[hf]" to run language models'
        ) from error
    dtype = model_dtype or "auto"
    device = device or "auto"
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = os.path.expanduser(os.fspath(tokenizer))
    if not isinstance(model, str | os.PathLike):
        if {dtype, device} != {"auto"} or revision or trust_remote_code or allow_pickle:
            raise UsageError(
                "a loaded model, and options of loading",
                "the model with the dtype and on the device that it shall have",
            )
        with _quietly():
            opened = _take(model, tokenizer)
    else:
        path = os.path.expanduser(os.fspath(model))
        where = _device(device, rank)
        _check_there(path, "model")
        with _quietly():
            origin = {"revision": revision, "trust_remote_code": trust_remote_code}
            opened = _load(path, tokenizer, origin, dtype, allow_pickle)
        try:
            opened.module.to(where)
        except torch.OutOfMemoryError as error:
            raise BudgetError(
                f"the model does not fit on {where}",
                "",
                "take a smaller model dtype, or load it over several GPUs yourself and give it to "
                "nc.dump_language_model",
            ) from error
    if opened.head is None:
        logger.warning(
            "%s has no head that was trained: no classifier is stored, NC3 and NC4 are left out",
            opened.name,
        )
    return opened


def _check_there(path: str, what: str) -> None:
    """Tell a path where nothing is from a name on the hub, which has one slash at most."""
    place = Path(path)
    looks_local = place.is_absolute() or path.startswith(".") or len(place.parts) > 2
    checkpoint = place.parent.is_dir() and _STEP.fullmatch(place.name)
    if (looks_local or checkpoint) and not place.exists():
        raise DataError(
            f"no {what} at '{path}': nothing is there", "a folder, or a name on the hub"
        )


def _device(device: str, rank: int | None) -> str:
    """Choose where the model goes; each of several processes has a GPU of its own."""
    import torch

    # torchrun says which of this machine's GPUs is whose; else ranks take turns on them.
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device in ("auto", "cuda") and n:
        of_all = os.environ.get("RANK", "0") if rank is None else str(rank)
        local = os.environ.get("LOCAL_RANK") or of_all
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


# Taking a model that is loaded, or loading one; what transformers says becomes an error of a line.


def _take(module: Any, tokenizer: Any) -> LanguageModel:
    import torch

    if not isinstance(module, torch.nn.Module) or not hasattr(module, "config"):
        raise UsageError(
            f"a model of type {type(module).__name__}",
            "a path, a name on the hub, or a model of transformers",
        )
    if isinstance(tokenizer, str):
        tokenizer = _load_tokenizer(tokenizer, revision=None, trust_remote_code=False)
    if tokenizer is None:
        raise UsageError("a loaded model without tokenizer", "tokenizer=")
    kind = type(module).__name__
    path = getattr(module.config, "_name_or_path", "") or kind
    _check_kind(module.config, path)
    masked = is_masked([kind], module.config)
    return LanguageModel(module, tokenizer, name_of(path), step_of(path), head_of(module), masked)


def _load(
    path: str, tokenizer: Any, origin: Mapping[str, Any], dtype: str, allow_pickle: bool
) -> LanguageModel:
    """Load a model with the class that has the head its weights were trained with."""
    import transformers

    with _readable("model", path):
        config = transformers.AutoConfig.from_pretrained(path, **origin)
    _check_kind(config, path)
    # Before the weights: what is wrong with it shows sooner.
    tokenizer = path if tokenizer is None else tokenizer
    if isinstance(tokenizer, str):
        of_model = origin if tokenizer == path else {**origin, "revision": None}
        tokenizer = _load_tokenizer(tokenizer, **of_model)
    names = getattr(config, "architectures", None) or []
    masked = is_masked(names, config)
    auto: Any = transformers.AutoModel
    if not names or any(map(_has_head, names)):
        auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    with _readable("model", path, "" if allow_pickle else _remedy_for_pickles(Path(path))):
        module, info = auto.from_pretrained(
            path,
            **origin,
            **{_dtype_option(): dtype},
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
        )
    module = without_random_weights(module, info["missing_keys"], path)
    step = step_of(path, origin["revision"])
    return LanguageModel(module, tokenizer, name_of(path), step, head_of(module), masked)


def _load_tokenizer(path: str, **origin: Any) -> Any:
    from transformers import AutoTokenizer

    _check_there(path, "tokenizer")
    with _readable("tokenizer", path, "--tokenizer (tokenizer=) names another one"):
        return AutoTokenizer.from_pretrained(path, **origin)


def _dtype_option() -> str:
    """Name the option as this version of transformers does: ``torch_dtype`` before 4.56."""
    import transformers

    major, minor = (int(n) for n in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _remedy_for_pickles(folder: Path) -> str:
    """Say what helps where weights are there, but pickled."""
    if folder.is_dir() and (any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin"))):
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
            reason = "it is neither a folder nor a name on the hub"
            remedy = ""
        raise DataError(f"{what} '{path}' cannot be loaded: {reason}", "", remedy) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from reporting what is said here, and its bars to terminals."""
    from transformers.utils import logging as reports

    with ExitStack() as undo:
        undo.callback(reports.set_verbosity, reports.get_verbosity())
        if reports.is_progress_bar_enabled():
            undo.callback(reports.enable_progress_bar)
        reports.set_verbosity_error()
        if not sys.stderr.isatty():
            reports.disable_progress_bar()
        yield


# What a checkpoint is called, and what kind of model it holds.


def name_of(path: str) -> str:
    """Name a model by its path; a folder that is but a checkpoint, by the one above.

    Examples
    --------
    >>> name_of("runs/tiny/checkpoint-1000"), name_of("EleutherAI/pythia-70m")
    ('tiny', 'EleutherAI/pythia-70m')
    """
    place = Path(path)
    if not place.exists() and not _STEP.fullmatch(place.name):
        return path
    place = place.resolve()
    return place.parent.name if _STEP.fullmatch(place.name) else place.name


def step_of(*names: str | None) -> int | None:
    """Read a training step from a path or revision, the first that tells.

    Examples
    --------
    >>> step_of("runs/tiny/checkpoint-1000"), step_of("main", "step143000"), step_of("gpt2")
    (1000, 143000, None)
    """
    for name in names:
        steps = _STEP.findall(Path(name).name) if name else []
        if steps:
            return int(steps[-1])
    return None


def _check_kind(config: Any, path: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(
            f"model '{path}' is an encoder with a decoder", "a causal or a masked language model"
        )


def is_masked(names: list[str], config: Any) -> bool:
    """Whether a model predicts masked tokens, by the names of classes, else by its type."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    for name in names:
        if name.endswith("ForMaskedLM"):
            return True
        # XLMWithLMHeadModel and its like may be either.
        if name.endswith(("ForCausalLM", "LMHeadModel")) and "WithLMHead" not in name:
            return False
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    decodes = causal and getattr(config, "is_decoder", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes


def _has_head(name: str) -> bool:
    """Whether a model class of this name ends in logits over tokens."""
    from transformers.models.auto import modeling_auto

    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    )
    # A type of model has one class for a purpose, or a tuple of several.
    classes = (names for mapping in mappings for names in mapping.values())
    known = any(name == each or (isinstance(each, tuple) and name in each) for each in classes)
    ends = ("ForCausalLM", "ForMaskedLM", "LMHeadModel")  # those that bring their own code
    return known or name.endswith(ends)


def head_of(module: Any) -> str | None:
    """Find the path of the module that gives the logits."""
    head = module.get_output_embeddings()
    if head is None:
        return None
    return next((path for path, part in module.named_modules() if part is head), None)


def without_random_weights(module: Any, missing_keys: list[str], path: str) -> Any:
    """Take the model without its head, if the checkpoint lacks weights of that.

    Weights that a checkpoint lacks are drawn at random: as a classifier they would say nothing.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    lacking = set(missing_keys) & parameters.keys()
    stored = {id(value) for name, value in parameters.items() if name not in lacking}
    # What is tied to a weight that is stored does not lack.
    lacking = {name for name in lacking if id(parameters[name]) not in stored}
    base = module.base_model
    base_weights = {id(value) for value in base.parameters()}
    # Poolers are no part of what is dumped, and many checkpoints lack them.
    inside = {name for name in lacking if id(parameters[name]) in base_weights}
    broken = sorted(name for name in inside if "pooler" not in name.split("."))
    if broken:
        raise DataError(
            f"model '{path}' lacks {len(broken)} weights, such as '{broken[0]}'",
            "a checkpoint of the whole model",
        )
    return base if lacking - inside else module


# Whether the module that a model calls its head gives its logits, and what is added outside of it.


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
    head = model.module.get_submodule(model.head)
    if not isinstance(head, torch.nn.Linear):
        return _without_head(model, "is no torch.nn.Linear")
    calls, logits = _run_head(model, head)
    if len(calls) != 1:
        return _without_head(model, "runs never or several times in a pass")
    if logits is None:
        return model  # nothing to compare with
    outputs = calls[0].to(logits.device)  # of several, where the model is spread over GPUs
    if torch.equal(outputs, logits):
        return model
    if outputs.shape == logits.shape:
        bias = _bias_outside(model.module, outputs, logits)
        if bias is not None or _rank_alike(outputs, logits):
            return replace(model, head_bias=bias)
    return _without_head(model, "does not give the logits")


def _run_head(
    model: LanguageModel, head: torch.nn.Linear
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Run the model on a few tokens: what the head gave, call by call, and the logits."""
    import torch

    calls: list[torch.Tensor] = []
    ids = torch.tensor([_probe_ids(model)], device=device_of(model.module))
    # A copy: the model may work in place on what its head gave.
    hook = head.register_forward_hook(lambda _, __, out: calls.append(out.clone()))
    with hook, capturing(model.module, {}), torch.no_grad():
        out: Any = model.module(**model.inputs(ids, torch.ones_like(ids)))
    return calls, getattr(out, "logits", None)


def _probe_ids(model: LanguageModel) -> list[int]:
    """Choose tokens from all over the vocabulary; special ones may ask for more than text."""
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    n = min(model.n_tokens, model.n_embeddings)
    step = max(n // (2 * _PROBE_TOKENS), 1)
    ids = [i for i in range(0, n, step) if i not in special] or [0]
    return ids[:: max(len(ids) // _PROBE_TOKENS, 1)][: min(_PROBE_TOKENS, model.context(None))]


def _bias_outside(module: Any, outputs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
    """Find the parameter or buffer that was added to the head's outputs."""
    import torch

    for tensor in chain(module.parameters(), module.buffers()):
        values = tensor.detach()
        if values.shape == logits.shape[-1:] and values.is_floating_point():
            # To the bit: another vector of the same length gives other sums.
            added = outputs + values.to(outputs.device)
            if added.dtype == logits.dtype and torch.equal(added, logits):
                return values
    return None


def _rank_alike(outputs: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the logits of each row grow with the outputs, and the same class wins."""
    import torch

    # In the order of the outputs the logits may fall by their rounding only.
    sorted_logits = logits.gather(-1, outputs.argsort(-1)).float()
    unit = torch.finfo(logits.dtype).eps * logits.abs().amax(-1, keepdim=True).float()
    grow = (sorted_logits.diff(dim=-1) >= -_ROUNDINGS * unit).all()
    return bool(grow) and torch.equal(outputs.argmax(-1), logits.argmax(-1))


def _without_head(model: LanguageModel, why: str) -> LanguageModel:
    logger.warning(
        "module '%s' of %s %s: no classifier is stored, NC3 and NC4 are left out",
        model.head,
        model.name,
        why,
    )
    return replace(model, head=None)
