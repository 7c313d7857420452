"""Training is one graph for ``torch.compile``, with the values and gradients of eager mode."""

from __future__ import annotations

import pytest
import torch
from tests.models.small import left_padded, random_ids, small_model


@pytest.mark.parametrize("batch", ["plain", "padded", "packed"])
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_training_forward_compiles_as_one_graph(attention, batch):
    model = small_model(attention=attention, num_hidden_layers=1).train()
    ids = random_ids(2, 35)
    kwargs = {"input_ids": ids, "labels": ids}
    if batch == "padded":
        ids, mask = left_padded([random_ids(35), random_ids(20)])
        kwargs = {
            "input_ids": ids,
            "labels": ids.masked_fill(mask == 0, -100),
            "attention_mask": mask,
        }
    elif batch == "packed":
        ids, cu_seqlens = random_ids(1, 70), torch.tensor([0, 5, 46, 47, 70]).int()
        kwargs = {"input_ids": ids, "labels": ids, "cu_seqlens": cu_seqlens}
    eager = model(**kwargs)
    eager.loss.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**kwargs)
    compiled.loss.backward()
    assert torch.allclose(compiled.loss, eager.loss)
    for weight, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(weight.grad, grad, atol=1e-5)
