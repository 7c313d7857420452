"""How a batch lies in memory: padding, packing and positions, resolved once per forward.

Sparse attention takes no mask. Left-padded rows are rolled so that each begins at column 0; padding
then lies after all real tokens, where causality hides it, and the outputs are rolled back. The
dense twin keeps the columns as they are, as its cache does, and gets a mask.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where the new tokens are.

    Args:
        positions: int64 ``[batch or 1, seq]``, of each token in its own sequence, as laid out.
        longest: tokens of the longest sequence, cached ones included.
        shift: int64 ``[batch, 1]``, columns by which rows are rolled to the left.
        counts: new real tokens of each row; None if all are.
        cu_seqlens: int32 ``[num_seqs + 1]`` of a packed batch.
        lengths: tokens of each packed sequence, for the dense twin.
        mask: bool ``[batch or 1, 1, seq, columns]``, for the dense twin; causality alone if None.
    """

    positions: Tensor
    longest: int
    shift: Tensor | None = None
    counts: list[int] | None = None
    cu_seqlens: Tensor | None = None
    lengths: list[int] | None = None
    mask: Tensor | None = None

    def roll(self, x: Tensor) -> Tensor:
        """Rows of ``x [batch, seq, dim]`` as laid out."""
        return x if self.shift is None else _rolled(x, self.shift)

    def roll_back(self, x: Tensor) -> Tensor:
        """Undoes ``roll``."""
        return x if self.shift is None else _rolled(x, -self.shift)


def _rolled(x: Tensor, shift: Tensor) -> Tensor:
    columns = torch.arange(x.shape[1], device=x.device)
    index = (columns + shift) % x.shape[1]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def packed_layout(cu_seqlens: Tensor, batch: int, num_tokens: int, *, rolls: bool) -> Layout:
    """Layout of ``[1, tokens]`` with several sequences; ``rolls`` as in ``padded_layout``.

    Raises:
        ValueError: there is more than one row, or ``cu_seqlens`` does not cut its tokens.
    """
    if batch != 1:
        raise ValueError(
            f"cu_seqlens: expected one row of packed tokens, [1, tokens], got {batch} rows. "
            "Concatenate them."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            "cu_seqlens: expected int32 [num_seqs + 1], got "
            f"{str(cu_seqlens.dtype).removeprefix('torch.')} {list(cu_seqlens.shape)}. Cast it "
            "with .int()."
        )
    longest, lengths, mask = num_tokens, None, None
    if not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens: expected to rise from 0 to the number of tokens = {num_tokens}, got "
                f"{bounds}."
            )
        lengths = [b - a for a, b in pairwise(bounds)]
        longest = max(lengths)
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    positions = (token - cu_seqlens[sequence])[None]
    if rolls:
        return Layout(positions=positions, longest=longest, cu_seqlens=cu_seqlens)
    if lengths is None:  # a traced graph cannot depend on them
        mask = ((sequence[:, None] == sequence) & (token[:, None] >= token))[None, None]
    return Layout(
        positions=positions, longest=longest, cu_seqlens=cu_seqlens, lengths=lengths, mask=mask
    )


def find_packing(position_ids: Tensor | None) -> Tensor | None:
    """``cu_seqlens`` of one row whose positions restart at 0, None if they do not.

    This is how ``transformers.DataCollatorWithFlattening`` marks sequences by default. A traced
    graph cannot depend on values, so there only ``cu_seqlens`` marks them.
    """
    if position_ids is None or position_ids.shape[0] != 1 or torch.compiler.is_compiling():
        return None
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    if len(starts) < 2:
        return None
    end = starts.new_tensor([position_ids.shape[1]])
    return torch.cat((starts, end)).to(torch.int32)


def padded_layout(
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    *,
    past: list[int],
    past_columns: int,
    device: torch.device,
    rolls: bool,
) -> Layout:
    """Layout of a batch, possibly padded, possibly after cached tokens.

    Args:
        shape: rows, and columns of new tokens.
        attention_mask: ``[batch, past_columns + seq]``, nonzero at real tokens; None if all are.
        past: real cached tokens of each row; empty if they are to be counted in the mask.
        past_columns: columns of the cached batch, padding included.
        device: of the tokens.
        rolls: rolls rows (sparse), or makes a mask (dense).

    Raises:
        ValueError: the mask's shape does not fit, a row's real tokens are not side by side, or the
            mask disagrees with the cache.
    """
    batch, seq = shape
    columns = torch.arange(seq, device=device)
    real = _real_tokens(attention_mask, batch, seq, past_columns, device)
    if real is None:
        lengths = past or [past_columns]
        positions = torch.tensor(lengths, device=device)[:, None] + columns
        mask = None if rolls or not past_columns else _causal(seq, past_columns, device)
        return Layout(positions=positions, longest=max(lengths) + seq, mask=mask)
    new, cached = real[:, past_columns:], real[:, :past_columns].sum(-1, keepdim=True)
    shift, counts, longest = new.int().argmax(-1, keepdim=True), None, past_columns + seq
    if not torch.compiler.is_compiling():
        _check_contiguous(real)
        counts = new.sum(-1).tolist()
        lengths = cached[:, 0].tolist()
        if past and lengths != past:
            raise ValueError(
                f"attention_mask: expected {past} real tokens in the cached columns, as the cache "
                f"holds, got {lengths}. A mask cannot hide cached tokens."
            )
        longest = max(a + b for a, b in zip(lengths, counts, strict=True))
        counts = None if min(counts) == seq else counts
        shift = shift if bool(shift.any()) else None
    if rolls:
        return Layout(positions=cached + columns, longest=longest, shift=shift, counts=counts)
    mask = None
    if past_columns or shift is not None:
        visible = _causal(seq, past_columns, device) & real[:, None, None, :]
        # A query of padding sees itself: softmax over nothing is NaN, which would spread.
        mask = visible | _own_column(seq, past_columns, device)
    positions = cached + columns - (0 if shift is None else shift)
    return Layout(positions=positions.clamp(min=0), longest=longest, counts=counts, mask=mask)


def _real_tokens(
    attention_mask: Tensor | None, batch: int, seq: int, past_columns: int, device: torch.device
) -> Tensor | None:
    if attention_mask is None:
        return None
    expected = [batch, past_columns + seq]
    if list(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask: expected {expected}, one entry per cached and new token, got "
            f"{list(attention_mask.shape)}."
        )
    return attention_mask.to(device).bool()


def _check_contiguous(real: Tensor) -> None:
    begins = (real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, :1].sum(-1)
    if bool((begins > 1).any()):
        row = int((begins > 1).nonzero()[0, 0])
        raise ValueError(
            "attention_mask: expected the real tokens of each row side by side, got a hole in row "
            f"{row}. Pad on the left to generate, and on one side only to train."
        )


def _causal(seq: int, past_columns: int, device: torch.device) -> Tensor:
    query = torch.arange(past_columns, past_columns + seq, device=device)[:, None]
    return (torch.arange(past_columns + seq, device=device) <= query)[None, None]


def _own_column(seq: int, past_columns: int, device: torch.device) -> Tensor:
    query = torch.arange(past_columns, past_columns + seq, device=device)[:, None]
    return (torch.arange(past_columns + seq, device=device) == query)[None, None]


def check_positions(position_ids: Tensor, layout: Layout, attention_mask: Tensor | None) -> None:
    """Blocks are counted from the start of a sequence, so positions cannot be chosen freely.

    Raises:
        ValueError: another shape, or the position of a real token is not the one of the layout.
    """
    seq = layout.positions.shape[1]
    if position_ids.dim() != 2 or position_ids.shape[1] != seq:
        raise ValueError(
            f"position_ids: expected [batch, {seq}] like the input, got "
            f"{list(position_ids.shape)}. Leave them out."
        )
    expected = layout.roll_back(
        layout.positions.expand(position_ids.shape[0], -1)[..., None]
        if layout.shift is None
        else layout.positions[..., None]
    )[..., 0]
    differs = expected != position_ids.to(expected.device)
    if attention_mask is not None:
        differs &= attention_mask[:, -position_ids.shape[1] :].to(expected.device).bool()
    if bool(differs.any()):
        row, column = differs.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids: expected {int(expected[row, column])} at row {row}, column {column}, "
            f"got {int(position_ids[min(row, len(position_ids) - 1), column])}. Positions count "
            "the tokens of each sequence; leave position_ids out."
        )
