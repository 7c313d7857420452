"""Keys and values of one layer for decoding.

Three branches; compressed blocks are written as their windows close.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig

_FIRST_CAPACITY = 64  # tokens; below that, growing would only move memory


class TokenKV(NamedTuple):
    """One entry per new token, ``[batch, seq, kv_heads, dim]``.

    Fields that are the same tensor are stored once.
    """

    k_cmp: Tensor  # before rotation: phi sees it so
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor


class CachedKV(NamedTuple):
    """What ``nsa.nsa_decode`` reads. Entries past a row's length are stale or zero."""

    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor


# (raw keys [batch, span, kv_heads, Dk], raw values, first block of each row) -> compressed, rotated
Compress = Callable[[Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]


class LayerCache:
    """Right-padded rows of different lengths, in buffers that double when they are full.

    Token ``t`` of a row is at index ``t``; compressed block ``i`` (eq. 7) is stored as soon as its
    last token ``i * d + l - 1`` is. So everything follows from the lengths, and dropping the last
    tokens is only a change of length.

    Args:
        config: block size and stride of the compressed blocks.
    """

    def __init__(self, config: NSAConfig):
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forgets every row, and frees the memory."""
        self.seq_lens: list[int] = []
        self._tokens: dict[str, Tensor] = {}
        self._blocks: dict[str, Tensor] = {}
        self._stored_as: dict[str, str] = {}

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first ``append``."""
        return len(self.seq_lens)

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        buffers = [*self._tokens.values(), *self._blocks.values()]
        return sum(x.numel() * x.element_size() for x in buffers)

    def append(self, new: TokenKV, compress: Compress, counts: list[int] | None = None) -> None:
        """Adds tokens to every row and compresses the blocks that they complete.

        Args:
            new: the tokens, right-padded.
            compress: runs phi and the rotation. Called only if a window closes, with the raw tokens
                of the new blocks, and the index of each row's first new block.
            counts: real tokens of each row, all of them if None.

        Raises:
            ValueError: the batch differs from that of the cache.
        """
        batch, num_new = new.k_slc.shape[:2]
        if self.seq_lens and batch != self.batch_size:
            raise ValueError(
                f"cache: expected a batch of {self.batch_size} rows, as it holds, got {batch}. "
                "Start with an empty cache, or select its rows first."
            )
        starts = self.seq_lens or [0] * batch
        counts = counts or [num_new] * batch
        if not self._stored_as:
            self._name_buffers(new)
        self._tokens = {
            name: _reserve(self._tokens.get(name), getattr(new, name), max(starts) + num_new)
            for name in dict.fromkeys(self._stored_as.values())
        }
        for name, buffer in self._tokens.items():
            _write(buffer, getattr(new, name).detach(), starts)
        self.seq_lens = [start + count for start, count in zip(starts, counts, strict=True)]
        self._close_windows(starts, compress)

    def _name_buffers(self, new: TokenKV) -> None:
        """The first of identical tensors lends its name to the buffer of them all."""
        for name, tensor in new._asdict().items():
            same = [other for other in self._stored_as if getattr(new, other) is tensor]
            self._stored_as[name] = self._stored_as[same[0]] if same else name

    def _close_windows(self, starts: list[int], compress: Compress) -> None:
        first = [self.config.num_compressed(length) for length in starts]
        last = [self.config.num_compressed(length) for length in self.seq_lens]
        num_new = max(b - a for a, b in zip(first, last, strict=True))
        raw_k, raw_v = self._token_buffer("k_cmp"), self._token_buffer("v_cmp")
        if num_new:
            stride = self.config.compress_stride
            span = (num_new - 1) * stride + self.config.compress_block_size
            tokens = [block * stride for block in first]
            k_cmp, v_cmp = compress(
                _read(raw_k, tokens, span), _read(raw_v, tokens, span), list(first)
            )
        else:
            k_cmp, v_cmp = raw_k[:, :0], raw_v[:, :0]
        for name, blocks in (("k_cmp", k_cmp), ("v_cmp", v_cmp)):
            # A row that closes fewer windows than others is given more blocks than it has. They lie
            # past its length, so they are never read, and are overwritten when their turn comes.
            buffer = _reserve(self._blocks.get(name), blocks, max(first) + num_new)
            _write(buffer, blocks.detach(), first)
            self._blocks[name] = buffer

    def _token_buffer(self, name: str) -> Tensor:
        return self._tokens[self._stored_as[name]]

    def tensors(self) -> CachedKV:
        """Views of the buffers, as long as the longest row."""
        longest = max(self.seq_lens)
        tokens = [self._token_buffer(name)[:, :longest] for name in CachedKV._fields[2:]]
        blocks = self.config.num_compressed(longest)
        return CachedKV(*[self._blocks[name][:, :blocks] for name in ("k_cmp", "v_cmp")], *tokens)

    def crop(self, num_tokens: int) -> None:
        """Drops the last ``num_tokens`` tokens of every row (all of a shorter row).

        Raises:
            ValueError: the number is negative.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens: expected at least 0 tokens to drop, got {num_tokens}.")
        self.seq_lens = [max(0, length - num_tokens) for length in self.seq_lens]

    def select_rows(self, rows: Tensor | list[int]) -> None:
        """Keeps these rows in this order; a row may be repeated (beam search, speculation)."""
        chosen = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if not self.seq_lens:
            return
        self.seq_lens = [self.seq_lens[row] for row in chosen]
        for buffers in (self._tokens, self._blocks):
            for name, buffer in buffers.items():
                buffers[name] = buffer[torch.tensor(chosen, device=buffer.device)]

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes the old row ``rows[i]``."""
        self.select_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times, copies side by side."""
        self.select_rows([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows ``indices``; a boolean mask works too."""
        self.select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)


def _reserve(buffer: Tensor | None, like: Tensor, length: int) -> Tensor:
    """A buffer of at least ``length`` entries, twice the old one if that has to grow.

    New memory is zero, not uninitialised: padded queries may read it, and NaN would spread.
    """
    if buffer is not None and buffer.shape[1] >= length:
        return buffer
    capacity = max(length, _FIRST_CAPACITY if buffer is None else 2 * buffer.shape[1])
    grown = like.new_zeros(like.shape[0], capacity, *like.shape[2:])
    if buffer is not None:
        grown[:, : buffer.shape[1]] = buffer
    return grown


def _write(buffer: Tensor, new: Tensor, starts: list[int]) -> None:
    if len(set(starts)) == 1:
        buffer[:, starts[0] : starts[0] + new.shape[1]] = new
        return
    for row, start in enumerate(starts):
        buffer[row, start : start + new.shape[1]] = new[row]


def _read(buffer: Tensor, starts: list[int], length: int) -> Tensor:
    if len(set(starts)) == 1:
        return buffer[:, starts[0] : starts[0] + length]
    needed = max(starts) + length
    if needed > buffer.shape[1]:
        buffer = torch.nn.functional.pad(buffer, (0, 0, 0, 0, 0, needed - buffer.shape[1]))
    return torch.stack([buffer[row, start : start + length] for row, start in enumerate(starts)])
