"""A tokenizer whose tokens are characters, made without a network."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHARACTERS = string.ascii_letters + string.digits + " .,;:!?'-\n"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Token 0 is padding, 1 the end, 2 anything unknown; below 97 tokens in all."""
    names = ["<pad>", "<end>", "<unk>", *_CHARACTERS]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        padding_side="left",
    )
