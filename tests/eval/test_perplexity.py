from __future__ import annotations

import math

import pytest
import torch
from tests.eval.samples import llama, prose, tokenizer

from nsa.eval.perplexity import perplexity_by_position
from nsa.eval.settings import PerplexitySettings

TEXTS = [prose(60, 1), prose(3, 2)]


def measure(settings: PerplexitySettings, **options):
    return perplexity_by_position(
        llama(), tokenizer(), TEXTS, settings, num_positions=1024, **options
    )


def test_bins_hold_the_losses_at_their_positions():
    settings = PerplexitySettings(max_tokens=200, bin_edges=(1, 50, 200))
    got = measure(settings)
    bins: list[list[float]] = [[], []]
    start, end = tokenizer().bos_token_id, tokenizer().eos_token_id
    for text in TEXTS:
        ids = torch.tensor([start, *tokenizer()(text, add_special_tokens=False)["input_ids"], end])[
            :200
        ]
        with torch.no_grad():
            logp = llama()(ids[None]).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            bins[position >= 50].append(-float(logp[position - 1, ids[position]]))
    expected = [sum(losses) / len(losses) for losses in bins]
    assert got.bin_losses == pytest.approx(expected, rel=1e-5)
    assert got.bin_tokens == tuple(map(len, bins))
    assert got.perplexity == pytest.approx(math.exp(sum(map(sum, bins)) / sum(map(len, bins))))


def test_reads_all_positions_by_default():
    assert measure(PerplexitySettings()).bin_edges == (1, 64, 128, 256, 512, 1024)


def test_progress_ends_at_the_number_of_documents():
    seen: list[int] = []
    measure(PerplexitySettings(), on_documents=seen.append)
    assert seen[-1] == len(TEXTS)


def test_more_than_the_model_can_read():
    with pytest.raises(ValueError, match="max_tokens: expected at most 1024, the positions of"):
        measure(PerplexitySettings(max_tokens=1025))
