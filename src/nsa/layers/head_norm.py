"""Optional normalisation of each head of queries and keys (QK-norm)."""

from __future__ import annotations

from torch import Tensor, nn


class HeadRMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the channels of a head, computed in the dtype of its weight.

    Under autocast, projections are narrower than weights, and torch's norm wants one dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Like x, ``[..., head_dim]``, in x's dtype."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def head_norm(head_dim: int, eps: float | None) -> nn.Module:
    """The norm, or the identity if ``eps`` is None."""
    return nn.Identity() if eps is None else HeadRMSNorm(head_dim, eps=eps)
