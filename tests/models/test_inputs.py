"""What the model accepts, and what it says of the rest."""

from __future__ import annotations

import pytest
import torch
from tests.models.small import VOCAB, random_ids, small_model


def test_int32_serves_as_well():
    model, ids = small_model(), random_ids(2, 9)
    assert torch.equal(model(ids.int(), labels=ids.int()).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param({}, "input_ids, inputs_embeds: expected exactly one", id="nothing"),
        pytest.param(
            {"input_ids": random_ids(1, 0)}, r"at least one token, got \[1, 0\]", id="none"
        ),
        pytest.param(
            {"input_ids": random_ids(0, 4)}, r"at least one token, got \[0, 4\]", id="batch"
        ),
        pytest.param(
            {"input_ids": random_ids(1, 9).float()},
            r"input_ids: expected int64 \[batch, seq\], got float32 \[1, 9\]. Cast",
            id="float",
        ),
        pytest.param(
            {"input_ids": random_ids(9)},
            r"input_ids: .*got int64 \[9\].* shape \[1, seq\]",
            id="rank",
        ),
        pytest.param(
            {"input_ids": torch.tensor([[3, VOCAB]])},
            "input_ids: expected ids from 0 to 96, got 97. Tokenizer",
            id="vocabulary",
        ),
        pytest.param(
            {"input_ids": torch.tensor([[3, -100]])}, "input_ids: .*got -100", id="negative"
        ),
        pytest.param(
            {"inputs_embeds": torch.ones(1, 9, 31)},
            r"inputs_embeds: expected floats .*hidden_size = 32\], got float32 \[1, 9, 31\]",
            id="embeds",
        ),
        pytest.param(
            {"input_ids": random_ids(2, 9), "labels": random_ids(9, 2)},
            r"labels: expected int64 \[2, 9\] like the input, got int64 \[9, 2\]. They are shifted",
            id="labels-shape",
        ),
        pytest.param(
            {"input_ids": random_ids(2, 9), "labels": torch.ones(2, 9)},
            r"labels: expected int64 \[batch, seq\], got float32 \[2, 9\]",
            id="labels-float",
        ),
        pytest.param(
            {"input_ids": random_ids(1, 2), "labels": torch.tensor([[-100, VOCAB]])},
            "labels: expected ids from 0 to 96, got 97",
            id="labels-vocabulary",
        ),
        pytest.param(
            {"input_ids": random_ids(2, 9), "attention_mask": torch.tensor([[1] * 9, [0] * 9])},
            "attention_mask: expected a real token in each row, got a row of padding",
            id="no-real-token",
        ),
        pytest.param(
            {"input_ids": random_ids(1, 9), "position_ids": torch.arange(8)[None]},
            r"position_ids: expected \[batch, 9\] like the input, got \[1, 8\]",
            id="positions-shape",
        ),
        pytest.param(
            {"input_ids": random_ids(1, 513)},
            r"at most 512 tokens \(max_position_embeddings\), got 513.*yarn",
            id="too-long",
        ),
        pytest.param(
            {
                "input_ids": random_ids(1, 9),
                "attention_mask": torch.tensor([[1] * 4 + [0] + [1] * 4]),
            },
            "attention_mask: expected the real tokens of each row side by side",
            id="hole",
        ),
        pytest.param(
            {
                "input_ids": random_ids(1, 9),
                "cu_seqlens": torch.tensor([0, 9]).int(),
                "attention_mask": torch.ones(1, 9),
            },
            "attention_mask: expected None with cu_seqlens",
            id="mask-and-packed",
        ),
        pytest.param(
            {
                "input_ids": random_ids(1, 9),
                "cu_seqlens": torch.tensor([0, 9]).int(),
                "use_cache": True,
            },
            "cu_seqlens: expected no cache with packed sequences",
            id="cache-and-packed",
        ),
        pytest.param(
            {"input_ids": random_ids(1, 9), "position_ids": torch.arange(5, 14)[None]},
            "position_ids: expected 0 at row 0, column 0, got 5",
            id="positions",
        ),
        pytest.param(
            {"input_ids": random_ids(1, 9), "output_attentions": True},
            "output_attentions: expected False.*nsa inspect",
            id="attentions",
        ),
        pytest.param(
            {"input_ids": random_ids(1, 9), "head_mask": 1},
            r"forward: unexpected argument\(s\) head_mask",
            id="unknown",
        ),
        pytest.param(
            {"input_ids": random_ids(1, 9), "labels": random_ids(1, 9), "logits_to_keep": 1},
            "logits_to_keep: expected 0 with labels",
            id="keep-and-labels",
        ),
    ],
)
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_bad_input(attention, kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_model(attention=attention)(**kwargs)
