"""What the tests of evaluation share: text, a tokenizer, models that do and do not look back."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from nsa.eval.haystack import Haystack
from nsa.train.tokenizer import train_tokenizer

_WORDS = "ship sea captain white whale sails under a pale moon while old men sing of the deep"


def prose(num_sentences: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    sentences = (
        " ".join(rng.choices(_WORDS.split(), k=rng.randint(4, 12))).capitalize() + rng.choice(".!?")
        for _ in range(num_sentences)
    )
    return " ".join(sentences)


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([prose(100)], vocab_size=320)


@functools.cache
def haystack(num_sentences: int = 300) -> Haystack:
    return Haystack.from_texts([prose(num_sentences, 1), prose(num_sentences, 2)], tokenizer())


def llama(max_positions: int = 1024) -> LlamaForCausalLM:
    """A dense model that has learned nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=max_positions,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


class Retriever(nn.Module):
    """Predicts what followed the longest earlier occurrence of the text's end.

    Args:
        memory: how many tokens back it can look.
    """

    def __init__(self, memory: int = 1 << 30) -> None:
        super().__init__()
        self.memory = memory
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self, input_ids: Tensor, *, use_cache: bool, logits_to_keep: int
    ) -> SimpleNamespace:
        length = input_ids.shape[1]
        kept = range(length - logits_to_keep, length)
        logits = torch.zeros(len(input_ids), logits_to_keep, len(tokenizer()))
        for row, ids in enumerate(input_ids.tolist()):
            for place, position in enumerate(kept):
                logits[row, place, self._next(ids[: position + 1])] = 12.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **_options: object) -> Tensor:
        for _ in range(max_new_tokens):
            logits = self(input_ids, use_cache=False, logits_to_keep=1).logits
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    def _next(self, ids: list[int]) -> int:
        last = len(ids) - 1
        best, followed_by = 0, ids[last]
        for end in range(max(0, last - self.memory), last):
            same = 0
            while same <= end and ids[end - same] == ids[last - same]:
                same += 1
            if same > best:
                best, followed_by = same, ids[end + 1]
        return followed_by
