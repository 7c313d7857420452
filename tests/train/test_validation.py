"""Losses by position agree with one forward pass per document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from nsa.models import NSAForCausalLM, NSAModelConfig
from nsa.train import validation as module
from nsa.train.validation import (
    PositionLosses,
    consecutive_pieces,
    default_bin_edges,
    position_losses,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def _model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    geometry = {"compress_block_size": 8, "compress_stride": 4, "block_size": 8, "window_size": 8}
    return NSAForCausalLM(
        NSAModelConfig(**SIZES, **geometry, num_selected_blocks=4, attention=name)
    ).eval()


def _documents(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 50, size=n).tolist() for n in lengths]


def _one_by_one(model: PreTrainedModel, documents: Sequence[Sequence[int]], max_len: int) -> list:
    """(position, loss) of every predicted token."""
    pairs = []
    for document in documents:
        ids = torch.tensor([document[:max_len]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        losses = cross_entropy(logits, ids[0, 1:], reduction="none")
        pairs += list(enumerate(losses.tolist(), start=1))
    return pairs


@pytest.mark.parametrize("name", ["nsa", "dense", "llama"])
@pytest.mark.parametrize("batch_tokens", [None, 1, 300], ids=["default", "single", "large"])
def test_agrees_with_one_document_at_a_time(name: str, batch_tokens: int | None) -> None:
    model = _model(name)
    documents = _documents(5, 100, 33, 2, 64, 120, 33)
    edges = (1, 4, 32, 90)
    result = position_losses(
        model, documents, max_len=96, bin_edges=edges, batch_tokens=batch_tokens
    )
    pairs = _one_by_one(model, documents, 96)
    assert result.loss == pytest.approx(np.mean([loss for _, loss in pairs]), rel=1e-5)
    assert result.num_tokens == len(pairs)
    assert result.num_documents == 7
    assert result.bin_edges == edges
    for index, (first, last) in enumerate(pairwise(edges)):
        inside = [loss for position, loss in pairs if first <= position < last]
        assert result.bin_tokens[index] == len(inside)
        assert result.bin_losses[index] == pytest.approx(np.mean(inside), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "lengths"),
    [(2, [2]), (4, [4]), (5, [4]), (6, [4, 2]), (8, [4, 4]), (9, [4, 4]), (11, [4, 4, 3])],
)
def test_pieces_are_the_whole_document(length: int, lengths: list[int]) -> None:
    document = np.arange(length)
    cut = consecutive_pieces([document, document], 4)
    assert [len(piece) for piece in cut] == lengths * 2
    together = np.concatenate(cut[: len(lengths)])
    assert together.tolist() == document[: len(together)].tolist()
    assert length - len(together) <= 1


def test_rows_of_logits_are_cut_without_changing_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, documents = _model("nsa"), _documents(50, 61)
    whole = position_losses(model, documents, max_len=64)
    monkeypatch.setattr(module, "_LOGIT_ROWS", 7)
    cut = position_losses(model, documents, max_len=64)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    assert cut.bin_tokens == whole.bin_tokens


def test_arrays_work_progress_is_told_and_the_mode_comes_back() -> None:
    model = _model("nsa").train()
    documents = [np.asarray(d, dtype=np.uint32) for d in _documents(9, 30, 12)]
    done: list[int] = []
    result = position_losses(model, documents, max_len=32, on_documents=done.append)
    assert model.training
    assert done[-1] == 3
    assert sorted(done) == done
    # No token lies from 32 on; the last edge of the default bins is max_len.
    assert result.bin_edges == (1, 32)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_empty_bin_is_nan_and_loss_counts_tokens_outside_bins() -> None:
    result = position_losses(_model("nsa"), _documents(6), max_len=64, bin_edges=(1, 3, 10, 20))
    assert math.isnan(result.bin_losses[2])
    assert result.bin_tokens == (2, 3, 0)
    narrow = position_losses(_model("nsa"), _documents(6), max_len=64, bin_edges=(2, 3))
    assert narrow.num_tokens == 5
    assert narrow.bin_tokens == (1,)
    assert narrow.loss == pytest.approx(result.loss)


def test_default_edges_double_up_to_the_end() -> None:
    assert default_bin_edges(300) == (1, 64, 128, 256, 300)
    assert default_bin_edges(64) == (1, 64)
    assert default_bin_edges(2) == (1, 2)


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    losses = PositionLosses(
        loss=1e4,
        num_tokens=1,
        num_documents=1,
        bin_edges=(1, 2),
        bin_losses=(1e4,),
        bin_tokens=(1,),
    )
    assert losses.perplexity == math.inf


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        pytest.param([], {}, r"token_documents: expected at least one document", id="none"),
        pytest.param([[1, 2], [3]], {}, r"documents\[1\]: expected at least 2 tokens", id="short"),
        pytest.param([[1, 2]], {"max_len": 1}, r"max_len: expected at least 2 tokens", id="len"),
        pytest.param([[1, 2]], {"bin_edges": (3, 3)}, r"two increasing positions", id="edges"),
        pytest.param([[1, 2]], {"bin_edges": (0, 3)}, r"positions from 1, got", id="zero"),
        pytest.param([[1, 2]], {"bin_edges": (1,)}, r"at least two increasing", id="one-edge"),
    ],
)
def test_bad_input(documents: list[list[int]], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        position_losses(_model("llama"), documents, **{"max_len": 8, **options})
