"""Every check at the public edge, on its message: what was expected, what came, what to do."""

import re

import pytest
import torch

from nsa.config import NSAConfig
from nsa.ops import checks


def _zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


BATCH, PACKED = _zeros(2, 8, 4, 16), _zeros(8, 4, 16)
KEYS, PACKED_KEYS = _zeros(2, 8, 2, 16), _zeros(8, 2, 16)
CU = torch.tensor([0, 3, 8]).int()
META = _zeros(2, 8, 4, 16, device="meta")


def _mode(x, cu_seqlens=None):
    return lambda: checks.mode("q", x, cu_seqlens)


def _cu_seqlens(values):
    return _mode(PACKED, torch.tensor(values).int())


def _same_kind(x, q=BATCH):
    return lambda: checks.same_kind("k", x, q)


def _keys_values(k, v, q=BATCH):
    return lambda: checks.keys_values(q, k, v, ("k", "v"))


def _token_keys(q, k, offset=0):
    return lambda: checks.token_keys(q, k, k, ("k", "v"), offset)


def _compressed(q, num_compressed, offset=0):
    x = _zeros(2, num_compressed, 2, 16)
    return lambda: checks.compressed_keys(q, num_compressed, "k_cmp", x, offset, 4, 2)


def _indices(block_indices):
    return lambda: checks.indices(block_indices, BATCH, KEYS)


MESSAGES = {
    "scale": (
        lambda: checks.scale(float("inf"), 64),
        "softmax_scale: expected a finite float, got inf.",
    ),
    "scale-tensor": (
        lambda: checks.scale(torch.tensor(0.1), 64),
        "softmax_scale: expected a finite float, got tensor(0.1000).",
    ),
    "flag": (
        lambda: checks.flag("recompute", "no"),
        "recompute: expected True or False, got 'no'.",
    ),
    "not-a-tensor": (_mode([1.0]), "q: expected a tensor, got list."),
    "sparse": (
        _mode(_zeros(4, 4).to_sparse()),
        "q: expected a dense (strided) tensor, got layout torch.sparse_coo. Call .to_dense().",
    ),
    "integer": (
        _mode(_zeros(2, 8, 4, 16, dtype=torch.int64)),
        "q: expected a floating dtype, got int64 [2, 8, 4, 16]. Cast it, for example with .float()",
    ),
    "rank": (
        _mode(_zeros(8, 16)),
        "q: expected [batch, seq, heads, dim], or [tokens, heads, dim] with cu_seqlens, got "
        "float32 [8, 16].",
    ),
    "no-heads": (
        _mode(_zeros(2, 8, 0, 16)),
        "q: expected at least one head and one channel, got float32 [2, 8, 0, 16].",
    ),
    "no-channels": (
        _mode(_zeros(8, 4, 0), CU),
        "q: expected at least one head and one channel, got float32 [8, 4, 0].",
    ),
    "batch-with-cu-seqlens": (
        _mode(BATCH, CU),
        "cu_seqlens: expected None with a batch, but q is float32 [2, 8, 4, 16]. Drop cu_seqlens",
    ),
    "empty-batch": (
        _mode(_zeros(0, 8, 4, 16)),
        "q: expected at least one sequence, got an empty batch, float32 [0, 8, 4, 16].",
    ),
    "cu-seqlens-missing": (
        _mode(PACKED),
        "cu_seqlens: required, because q is packed, float32 [8, 4, 16]. Pass int32 [num_seqs + 1]",
    ),
    "cu-seqlens-list": (_mode(PACKED, [0, 8]), "cu_seqlens: expected a tensor, got list."),
    "cu-seqlens-int64": (
        _mode(PACKED, CU.long()),
        "cu_seqlens: expected int32 [num_seqs + 1] with at least one sequence, got int64 [3]. Cast",
    ),
    "cu-seqlens-rank": (_mode(PACKED, CU[None]), "with at least one sequence, got int32 [1, 3]."),
    "cu-seqlens-no-sequence": (_cu_seqlens([0]), "at least one sequence, got int32 [1]."),
    "cu-seqlens-device": (
        _mode(PACKED, CU.to("meta")),
        "cu_seqlens: expected on cpu like q, got meta. Move it with .to().",
    ),
    "cu-seqlens-start": (
        _cu_seqlens([1, 8]),
        "cu_seqlens: expected to start at 0 and to end at the number of tokens = 8, got 1 and 8.",
    ),
    "cu-seqlens-end": (_cu_seqlens([0, 7]), "the number of tokens = 8, got 0 and 7."),
    "cu-seqlens-decreasing": (
        _cu_seqlens([0, 5, 4, 8]),
        "cu_seqlens: expected values that never decrease, got [0, 5, 4, 8].",
    ),
    "offset-negative": (
        lambda: checks.queries(BATCH, None, -1),
        "q_offset: expected an int, 0 with packed sequences and at least 0 with a batch, got -1.",
    ),
    "offset-packed": (
        lambda: checks.queries(PACKED, CU, 3),
        "q_offset: expected an int, 0 with packed sequences and at least 0 with a batch, got 3.",
    ),
    "offset-float": (
        lambda: checks.queries(BATCH, None, 1.0),
        "q_offset: expected an int, 0 with packed sequences and at least 0 with a batch, got 1.0.",
    ),
    "key-not-a-tensor": (_same_kind(None), "k: expected a tensor, got NoneType."),
    "key-rank": (
        _same_kind(PACKED),
        "k: expected rank 4 like q, float32 [2, 8, 4, 16], got float32 [8, 4, 16].",
    ),
    "key-dtype": (
        _same_kind(BATCH.half()),
        "k: expected torch.float32 like q, got torch.float16. Cast it with .to(q.dtype).",
    ),
    "key-device": (
        _same_kind(META),
        "k: expected on cpu like q, got meta. Move it with .to(q.device).",
    ),
    "key-batch": (_same_kind(KEYS[:1]), "k: expected batch 2 like q, got float32 [1, 8, 2, 16]."),
    "value-shape": (
        _keys_values(KEYS, KEYS[:, :7]),
        "v: expected [2, 8, 2] + [dim] like k, got float32 [2, 7, 2, 16].",
    ),
    "head-dim": (
        _keys_values(KEYS[..., :8], KEYS),
        "k: expected head dim 16 like q, got float32 [2, 8, 2, 8].",
    ),
    "heads-do-not-divide": (
        _keys_values(_zeros(2, 8, 3, 16), _zeros(2, 8, 3, 16)),
        "k: expected a number of kv heads that divides the 4 query heads, got 3. The layout is "
        "[batch, seq, heads, dim].",
    ),
    "no-kv-heads": (
        _keys_values(_zeros(2, 8, 0, 16), _zeros(2, 8, 0, 16)),
        "k: expected a number of kv heads that divides the 4 query heads, got 0.",
    ),
    "keys-too-short": (
        _token_keys(BATCH, KEYS, 3),
        "k: expected at least 11 keys, since queries reach position q_offset + seq - 1 = 10, got "
        "float32 [2, 8, 2, 16].",
    ),
    "packed-keys-too-many": (
        _token_keys(PACKED, _zeros(9, 2, 16)),
        "k: expected exactly 8 keys, since queries reach",
    ),
    "compressed-too-few": (
        _compressed(BATCH, 2),
        "k_cmp: expected at least 3 compressed blocks for 8 tokens, got float32 [2, 2, 2, 16]. "
        "Make it with nsa.compress_kv.",
    ),
    "compressed-too-few-with-offset": (
        _compressed(BATCH, 3, 2),
        "k_cmp: expected at least 4 compressed blocks for 10 tokens",
    ),
    "slots": (
        _compressed(PACKED, 3),
        "k_cmp: expected total_tokens // compress_stride = 4 slots for packed sequences, got",
    ),
    "geometry": (
        lambda: checks.geometry(6, 4),
        "compress_stride: expected a divisor of compress_block_size = 6, got 4.",
    ),
    "block-float": (
        lambda: checks.geometry(16.0, 4),
        "compress_block_size: expected a positive integer, got 16.0.",
    ),
    "stride-float": (
        lambda: checks.geometry(16, 4.0),
        "compress_stride: expected a positive integer, got 4.0.",
    ),
    "positive": (
        lambda: checks.positive("window_size", 0),
        "window_size: expected a positive integer, got 0.",
    ),
    "indices-list": (_indices([0]), "block_indices: expected a tensor, got list."),
    "indices-dtype": (
        _indices(_zeros(2, 8, 2, 3, dtype=torch.int64)),
        "block_indices: expected int32 [2, 8, 2] + [n], n at least 1, got int64 [2, 8, 2, 3]. Make "
        "them with nsa.select_blocks, or cast with .int().",
    ),
    "indices-shape": (
        _indices(_zeros(2, 8, 4, 3, dtype=torch.int32)),
        "block_indices: expected int32 [2, 8, 2] + [n], n at least 1, got int32 [2, 8, 4, 3].",
    ),
    "indices-rank": (
        _indices(_zeros(2, 8, 2, dtype=torch.int32)),
        "block_indices: expected int32 [2, 8, 2] + [n], n at least 1, got int32 [2, 8, 2].",
    ),
    "indices-none": (
        _indices(_zeros(2, 8, 2, 0, dtype=torch.int32)),
        "block_indices: expected int32 [2, 8, 2] + [n], n at least 1, got int32 [2, 8, 2, 0].",
    ),
    "indices-device": (
        _indices(_zeros(2, 8, 2, 3, dtype=torch.int32, device="meta")),
        "block_indices: expected on cpu like q, got meta.",
    ),
    "gates-list": (lambda: checks.gates([0.0], BATCH), "gates: expected a tensor, got list."),
    "gates-shape": (
        lambda: checks.gates(_zeros(2, 8, 3, 4), BATCH),
        "gates: expected [2, 8, 4, 3], one gate per branch in the order cmp, slc, win, got float32 "
        "[2, 8, 3, 4].",
    ),
    "gates-dtype": (
        lambda: checks.gates(_zeros(2, 8, 4, 3).double(), BATCH),
        "gates: expected torch.float32 like q, got torch.float64.",
    ),
    "value-dims": (
        lambda: checks.value_dims(KEYS, KEYS[..., :8], KEYS),
        "v_cmp, v_slc, v_win: expected one head dim, since the branch outputs are added, got 16, 8 "
        "and 16.",
    ),
    "config": (lambda: checks.config({}), "config: expected an nsa.NSAConfig, got dict."),
    "lse-none": (lambda: checks.log_sum_exp(None, BATCH), "lse: expected a tensor, got NoneType."),
    "lse-dtype": (
        lambda: checks.log_sum_exp(_zeros(2, 8, 4).half(), BATCH.half()),
        "lse: expected torch.float32 [2, 8, 4] on cpu, got float16 [2, 8, 4] on cpu. Take it from "
        "nsa.compressed_attention.",
    ),
    "lse-shape": (
        lambda: checks.log_sum_exp(_zeros(2, 4, 8), BATCH),
        "lse: expected torch.float32 [2, 8, 4] on cpu, got float32 [2, 4, 8] on cpu.",
    ),
    "lse-device": (
        lambda: checks.log_sum_exp(META[..., 0], BATCH),
        "lse: expected torch.float32 [2, 8, 4] on cpu, got float32 [2, 8, 4] on meta.",
    ),
}


@pytest.mark.parametrize(("call", "message"), MESSAGES.values(), ids=MESSAGES)
def test_says_what_was_expected_and_what_came(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_accepts_what_fits():
    checks.queries(BATCH, None, 5)
    checks.queries(PACKED, CU, 0)
    checks.token_keys(BATCH, KEYS, KEYS[..., :8], ("k", "v"), 0)
    checks.token_keys(BATCH[:, :3], KEYS, KEYS, ("k", "v"), 5)
    checks.token_keys(PACKED, PACKED_KEYS, PACKED_KEYS, ("k", "v"), 0)
    checks.compressed_keys(BATCH, 3, "k_cmp", KEYS[:, :3], 0, 4, 2)
    checks.compressed_keys(PACKED, 4, "k_cmp", PACKED_KEYS[:4], 0, 4, 2)
    checks.indices(_zeros(2, 8, 2, 5, dtype=torch.int32), BATCH, KEYS)
    checks.gates(_zeros(2, 8, 4, 3), BATCH)
    checks.log_sum_exp(_zeros(2, 8, 4), BATCH.half())
    checks.log_sum_exp(_zeros(2, 8, 4).double(), BATCH.double())
    checks.config(NSAConfig())
    assert checks.scale(None, 64) == 0.125
    assert checks.scale(2, 64) == 2.0


def test_lengths_elsewhere_are_not_read_back():
    """Reading them would wait for the device; meta tensors have no values at all."""
    checks.packed_lengths(CU.to("meta"), "q", PACKED.to("meta"))
