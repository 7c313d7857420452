"""What a conversion did: which tensors came from where, and how far the logits moved."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from transformers import PreTrainedModel


class LogitShift(NamedTuple):
    """Two models on one text: logits, distance of the predictions, losses in nats per token."""

    num_tokens: int
    max_change: float
    mean_change: float
    kl: float
    loss_before: float
    loss_after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """Result of ``convert_from_dense``; ``rich.print`` shows it as two tables.

    Args:
        architecture: class of the dense model.
        copied: each tensor of the new model that holds weights of the dense one, and how.
        initialised: each other tensor, and with what.
        exact_tokens: up to this length the selection branch alone is dense attention.
        shift: how far the logits moved.
    """

    architecture: str
    copied: Mapping[str, str]
    initialised: Mapping[str, str]
    exact_tokens: int
    shift: LogitShift

    def __rich__(self) -> Group:
        tensors = Table("tensors", "count", "now hold", title=f"From {self.architecture}")
        for kind in (self.copied, self.initialised):
            rows = Counter((re.sub(r"^.*?\.\d+\.", "", name), how) for name, how in kind.items())
            for (name, how), count in rows.items():
                tensors.add_row(name, str(count), how)
            tensors.add_section()
        shift = self.shift
        moved = Table("measure", "value", title=f"On a text of {shift.num_tokens:,} tokens")
        moved.add_row("loss of the dense model", f"{shift.loss_before:.4f} nats/token")
        moved.add_row("loss of the converted model", f"{shift.loss_after:.4f} nats/token")
        moved.add_row("KL(dense, converted)", f"{shift.kl:.2e} nats/token")
        moved.add_row("largest change of a logit", f"{shift.max_change:.2e}")
        moved.add_row("mean change of a logit", f"{shift.mean_change:.2e}")
        moved.add_row("selection reads everything up to", f"{self.exact_tokens:,} tokens")
        return Group(tensors, moved)


@torch.no_grad()
def measure_shift(before: PreTrainedModel, after: PreTrainedModel, token_ids: Tensor) -> LogitShift:
    """Compares two models in eval mode on one text.

    Args:
        before: the reference.
        after: the other, with the same vocabulary.
        token_ids: int64 ``[seq]`` with at least 2 tokens.

    Returns:
        The changes; in float64, though each model runs in its own dtype.
    """
    ids = token_ids[None]
    old, new = (_logits(model, ids) for model in (before, after))
    zero = torch.zeros((), dtype=torch.float64)
    largest = total = divergence = loss_before = loss_after = zero
    # In pieces, since float64 logits of a large vocabulary are many gigabytes.
    targets = token_ids[1:].cpu().split(128)
    for i, (a, b) in enumerate(zip(old.split(128), new.split(128), strict=True)):
        a, b = a.double(), b.double()
        change = (a - b).abs()
        largest = torch.maximum(largest, change.max())
        total = total + change.sum()
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        divergence = divergence + kl_div(log_q, log_p, reduction="sum", log_target=True)
        if i < len(targets):  # the last piece may hold nothing but the last token
            loss_before = loss_before + _nll(log_p, targets[i])
            loss_after = loss_after + _nll(log_q, targets[i])
    return LogitShift(
        num_tokens=len(token_ids),
        max_change=largest.item(),
        mean_change=total.item() / old.numel(),
        # Rounding can leave a tiny negative sum where the models agree.
        kl=max(0.0, divergence.item() / len(token_ids)),
        loss_before=loss_before.item() / (len(token_ids) - 1),
        loss_after=loss_after.item() / (len(token_ids) - 1),
    )


def _nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return nll_loss(log_probabilities[: len(targets)], targets, reduction="sum")


def _logits(model: Any, ids: Tensor) -> Tensor:
    training = model.training
    model.eval()
    try:
        return model(input_ids=ids.to(model.device), use_cache=False).logits[0].cpu()
    finally:
        model.train(training)
