"""Tiny tokenizers: a word is a token."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *"abcdefghij"])}


def raw_tokenizer(special: bool = False) -> Tokenizer:
    """Give a is 3, b is 4 and so on; with `special`, 1 begins a document and 2 ends it."""
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if special:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return tokenizer


def transformers_tokenizer(special: bool = False, **options: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw_tokenizer(special), unk_token="[UNK]", **options
    )
