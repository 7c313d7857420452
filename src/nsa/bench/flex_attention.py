"""The branches, and dense attention, by PyTorch's FlexAttention with a block mask.

Compiled on CUDA; elsewhere FlexAttention runs eagerly with scores of the whole sequence, which only
tests want. Masks are made outside the measured time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nsa.bench.workloads import Tensors
from nsa.config import NSAConfig

Call = Callable[[], tuple[Tensor, ...]]
# (batch, head, query, key) -> visible, on tensors of any one shape.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# FlexAttention's default: its kernels take no smaller block of queries.
BLOCK = 128


def dense(tensors: Tensors, _config: NSAConfig) -> Call:
    """Causal attention."""
    _, last = _queries_of_blocks(tensors["q"])
    keys = _starts(tensors["q"])
    return _attend(tensors, "slc", (keys <= last[:, None])[None], lambda b, h, q, k: q >= k)


def window(tensors: Tensors, config: NSAConfig) -> Call:
    """The window branch."""
    size = config.window_size
    first, last = _queries_of_blocks(tensors["q"])
    keys = _starts(tensors["q"])
    blocks = (keys <= last[:, None]) & (keys + BLOCK > first[:, None] - size + 1)
    return _attend(tensors, "win", blocks[None], lambda b, h, q, k: (q >= k) & (q - k < size))


def compressed(tensors: Tensors, config: NSAConfig) -> Call:
    """The compressed branch."""
    length, stride = config.compress_block_size, config.compress_stride
    _, last = _queries_of_blocks(tensors["q"])
    ends = _starts(tensors["k_cmp"]) * stride + length - 1
    return _attend(
        tensors,
        "cmp",
        (ends <= last[:, None])[None],
        lambda b, h, q, k: k * stride + length - 1 <= q,
    )


def selected(tensors: Tensors, config: NSAConfig) -> Call:
    """The selected branch: a block of queries walks every block that one of them chose."""
    q, chosen = tensors["q"], tensors["block_indices"][0]  # [seq, kv_heads, n]
    (seq_len, num_kv_heads), size = chosen.shape[:2], config.block_size
    num_blocks = config.num_blocks(seq_len)
    group = q.shape[2] // num_kv_heads
    member = torch.zeros(
        seq_len, num_kv_heads, num_blocks + 1, dtype=torch.bool, device=chosen.device
    )
    member.scatter_(-1, torch.where(chosen < 0, num_blocks, chosen).long(), True)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return member[q, h // group, k // size] & (q >= k)

    # Which blocks of BLOCK keys hold a key of a block that some query of BLOCK queries chose.
    rows = _starts(q).shape[0]
    grown = member.new_zeros(rows * BLOCK, num_kv_heads, num_blocks)
    grown[:seq_len] = member[..., :-1]
    chosen_by_rows = grown.view(rows, BLOCK, num_kv_heads, num_blocks).any(1).transpose(0, 1)
    starts = torch.arange(num_blocks, device=q.device) * size
    columns = _starts(q)
    touches = (starts[:, None] < columns + BLOCK) & (columns < starts[:, None] + size)
    blocks = (chosen_by_rows.float() @ touches.float()) > 0
    return _attend(tensors, "slc", blocks.repeat_interleave(group, dim=0), visible)


def _starts(x: Tensor) -> Tensor:
    """First position of each block of ``x``, ``[1, seq, ...]``."""
    return torch.arange(0, x.shape[1], BLOCK, device=x.device)


def _queries_of_blocks(q: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position of each block of queries."""
    first = _starts(q)
    return first, (first + BLOCK - 1).clamp(max=q.shape[1] - 1)


def block_mask(blocks: Tensor, visible: MaskMod, seq_lens: tuple[int, int]) -> BlockMask:
    """A block mask from the blocks that have anything visible.

    PyTorch's ``create_block_mask`` evaluates every pair of query and key, which takes gigabytes
    and minutes at the lengths that are measured.

    Args:
        blocks: bool ``[heads or 1, blocks of queries, blocks of keys]``.
        visible: what a query sees inside them.
        seq_lens: of queries and of keys.
    """
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        counts[None], order[None], BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=seq_lens
    )


def _attend(tensors: Tensors, branch: str, blocks: Tensor, visible: MaskMod) -> Call:
    q, k, v = tensors["q"], tensors[f"k_{branch}"], tensors[f"v_{branch}"]
    mask = block_mask(blocks, visible, (q.shape[1], k.shape[1]))
    attend = flex_attention
    if q.is_cuda:
        # Each length and mask is a compilation, and Dynamo gives up after a few of one function.
        torch.compiler.reset()
        # Donated buffers would allow one backward only, and it is timed many times. They are asked
        # about again in each backward.
        functorch_config.donated_buffer = False
        attend = torch.compile(flex_attention, dynamic=False)

    def call() -> tuple[Tensor, ...]:
        swapped_q, swapped_k, swapped_v = (x.transpose(1, 2) for x in (q, k, v))
        o = attend(swapped_q, swapped_k, swapped_v, block_mask=mask, enable_gqa=True)
        assert isinstance(o, Tensor), "without return_lse there is one output"
        return (o.transpose(1, 2),)

    return call
