"""Tools that trace the model or run it again: compile, export, selective checkpointing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.models.small import DEVICES, left_padded, random_ids, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of what inductor imports.
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
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")(**kwargs)
    compiled.loss.backward()
    assert torch.allclose(compiled.loss, eager.loss)
    for weight, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(weight.grad, grad, atol=1e-5)


@DEVICES
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_the_forward_exports(attention, device):
    model = small_model(attention=attention).to(device)
    ids = random_ids(2, 35).to(device)
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}).module()
    other = random_ids(2, 35, seed=2).to(device)
    found = exported(input_ids=other, use_cache=False).logits
    assert torch.allclose(found, model(input_ids=other, use_cache=False).logits, atol=1e-5)


class Calls(TorchDispatchMode):
    """The names of our operations, in the order in which they ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nsa":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
def test_attention_can_be_kept_when_all_else_is_recomputed(keep):
    model, ids = small_model(num_hidden_layers=1).train(), random_ids(2, 35)
    model(ids, labels=ids).loss.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()

    def policy(context, operation, *args, **kwargs):
        ours = operation.namespace == "nsa"
        return CheckpointPolicy.MUST_SAVE if keep and ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with Calls() as calls:
        out = checkpoint(model, ids, labels=ids, use_reentrant=False, context_fn=contexts)
        out.loss.backward()
    assert calls.names.count("nsa::nsa_attention_fwd") == (1 if keep else 2)
    for weight, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(weight.grad, grad)
