"""The model of `tiny_lm.py`: its text, its tokenizer and its training.

The text ships with Python: the standard library's sources, every tenth file kept for testing; out
of distribution is English prose, the help topics of ``pydoc``. Everything depends on the recipe and
on the version of Python only, and what exists is not done again.
"""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import shutil
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
PIECE = 4096  # characters of a document, about: sources are cut at the ends of lines
TEST_EVERY = 10  # of so many files one is for testing
# Not samples of code: tests, character tables, the help topics, and what pip put there.
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
SPLITS = ("train", "test", "ood")


@dataclass(frozen=True)
class Recipe:
    """Everything that the run depends on."""

    seed: int = 0
    characters: int = 10_000_000
    vocabulary: int = 2048
    n_blocks: int = 6
    n_heads: int = 4
    width: int = 128
    context: int = 128
    batch: int = 16
    steps: int = 1000
    checkpoints: int = 8
    rate: float = 2e-3
    train_tokens: int = 65_536  # of these features are dumped
    other_tokens: int = 16_384
    dump_batch: int = 16


QUICK = Recipe(
    characters=300_000,
    vocabulary=384,
    n_blocks=2,
    n_heads=2,
    width=32,
    context=64,
    batch=8,
    steps=30,
    checkpoints=3,
    rate=1e-2,
    train_tokens=6_000,
    other_tokens=2_000,
)


def write_file(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def write_texts(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Write the documents of each split, in an order drawn once."""
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    if all(path.exists() for path in paths.values()):
        return paths
    documents: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for number, (name, text) in enumerate(sources(recipe.characters)):
        split = "test" if number % TEST_EVERY == TEST_EVERY - 1 else "train"
        documents[split] += [{"name": name, "text": piece} for piece in pieces(text)]
    for name, text in sorted(pydoc_data.topics.topics.items()):
        documents["ood"] += [{"name": f"help({name})", "text": piece} for piece in pieces(text)]
    for split, path in paths.items():
        order = np.random.default_rng(recipe.seed).permutation(len(documents[split]))
        lines = (json.dumps(documents[split][i], ensure_ascii=False) for i in order)
        write_file(path, "".join(f"{line}\n" for line in lines))
    return paths


def sources(most: int) -> Iterator[tuple[str, str]]:
    """Read the standard library's files in order, until `most` characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if most > 0 and not SKIPPED.intersection(name.parts):
            with tokenize.open(path) as file:  # knows the file's encoding
                text = file.read()
            most -= len(text)
            yield name.as_posix(), text


def pieces(text: str) -> Iterator[str]:
    """Cut a text at line ends into pieces of about `PIECE` characters."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def documents(path: Path) -> list[str]:
    """Read the texts of a file of JSON lines."""
    return [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n") if line]


def make_tokenizer(recipe: Recipe, text: Path, folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level byte-pair tokenizer on the train documents, or load the one there."""
    path = folder / "tokenizer.json"
    if not path.exists():
        pairs = ByteLevelBPETokenizer()
        pairs.train_from_iterator(
            documents(text), vocab_size=recipe.vocabulary, special_tokens=[END], show_progress=False
        )
        write_file(path, pairs.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=END, pad_token=END, model_max_length=recipe.context
    )


def checkpoint_steps(recipe: Recipe) -> list[int]:
    """List step 0 and steps spaced like logarithms up to the last."""
    first = max(1, recipe.steps // 100)
    later = np.geomspace(first, recipe.steps, recipe.checkpoints - 1).round().astype(int)
    return sorted({0, *later.tolist()})


def train(
    recipe: Recipe,
    texts: dict[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> dict[int, Path]:
    """Train from the last checkpoint there is; returns all checkpoints by step."""
    paths = {step: folder / f"step-{step:06d}" for step in checkpoint_steps(recipe)}
    there = list(takewhile(lambda step: paths[step].exists(), paths))  # up to the first that lacks
    if len(there) == len(paths):
        return paths
    tokens = {split: token_stream(tokenizer, texts[split]) for split in ("train", "test")}
    model = load_model(paths[there[-1]]) if there else new_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    if there:
        state = torch.load(paths[there[-1]] / "optimizer.pt", weights_only=True)
        optimizer.load_state_dict(state)
    for step in range(there[-1] + 1 if there else 0, recipe.steps + 1):
        if step > 0:
            train_step(recipe, model, optimizer, tokens["train"], step)
        if step in paths and not paths[step].exists():
            losses = {split: mean_loss(model, stream, recipe) for split, stream in tokens.items()}
            save_checkpoint(model, optimizer, tokenizer, losses, paths[step])
            print(
                f"step {step}: loss {losses['train']:.3f}, {losses['test']:.3f} on held-out files"
            )
    return paths


def token_stream(tokenizer: PreTrainedTokenizerFast, text: Path) -> torch.Tensor:
    """Lay the tokens of all documents in a row, each followed by the end mark."""
    encoded = tokenizer(documents(text), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> GPTNeoXForCausalLM:
    """Build a model with weights drawn from the seed."""
    torch.manual_seed(recipe.seed)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.n_blocks,
        num_attention_heads=recipe.n_heads,
        max_position_embeddings=recipe.context,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPTNeoXForCausalLM(config)


def load_model(checkpoint: Path) -> GPTNeoXForCausalLM:
    """Load a checkpoint."""
    return GPTNeoXForCausalLM.from_pretrained(checkpoint)


def train_step(
    recipe: Recipe,
    model: GPTNeoXForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    step: int,
) -> None:
    """Learn from a batch that depends on the seed and the step only."""
    drawn = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - recipe.context, (recipe.batch, 1), generator=drawn)
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate * schedule(step / recipe.steps)
    model.train()
    next_token_loss(model, tokens[starts + torch.arange(recipe.context + 1)]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def schedule(done: float) -> float:
    """Rise to 1 over the first twentieth, then fall like a cosine to 0.05."""
    rising = min(1.0, done / 0.05)
    return rising * (0.05 + 0.95 * (1.0 + math.cos(math.pi * done)) / 2.0)


def next_token_loss(model: GPTNeoXForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Compute the mean cross-entropy in nats of windows (B, T + 1)."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.inference_mode()
def mean_loss(model: GPTNeoXForCausalLM, tokens: torch.Tensor, recipe: Recipe) -> float:
    """Compute the loss over the first windows, up to 128."""
    model.eval()
    n = min(128, len(tokens) // (recipe.context + 1))
    windows = tokens[: n * (recipe.context + 1)].view(n, recipe.context + 1)
    return float(np.mean([float(next_token_loss(model, part)) for part in windows.split(16)]))


def save_checkpoint(
    model: GPTNeoXForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerFast,
    losses: dict[str, float],
    path: Path,
) -> None:
    """Save what dumping and going on need; the folder appears complete or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    write_file(partial / "losses.json", json.dumps(losses) + "\n")
    partial.rename(path)
