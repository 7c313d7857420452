"""Launches the backward of the three branches: row values, dq, then dk and dv of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.kernels.key_gradients import range_dkv_kernel, selected_dkv_kernel, sum_parts_kernel
from nsa.kernels.query_gradients import delta_kernel, dq_kernel
from nsa.ops.launch.select_blocks import union_blocks
from nsa.ops.launch.tiles import LOG2_E, QueryTiles, ceil_div, heads, launch, next_power_of_2


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Saved tensors of one branch's forward."""

    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    block_indices: Tensor | None = None

    def contiguous(self) -> Branch:
        """The same with contiguous tensors."""
        indices = None if self.block_indices is None else self.block_indices.contiguous()
        return Branch(
            k=self.k.contiguous(),
            v=self.v.contiguous(),
            o=self.o.contiguous(),
            lse=self.lse.contiguous(),
            block_indices=indices,
        )


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The integers of a backward pass; those of absent branches are never read."""

    compress_block_size: int = 1
    compress_stride: int = 1
    block_size: int = 64
    window_size: int = 1
    softmax_scale: float
    q_offset: int = 0
    cu_seqlens: Tensor | None = None


def attention_bwd(
    do: Tensor,
    q: Tensor,
    branches: dict[str, Branch],
    gates: Tensor | None,
    geometry: Geometry,
    dlse: Tensor | None = None,
    dq_tile: tuple[int, int, int, int] = (64, 64, 4, 2),
) -> dict[str, Tensor]:
    """Gradients ``dq``, ``dgates``, ``dk_<branch>`` and ``dv_<branch>`` of the branches given.

    The branches are named "cmp", "slc" and "win".
    """
    do, q = do.contiguous(), q.contiguous()
    gates = None if gates is None else gates.contiguous()
    branches = {name: branch.contiguous() for name, branch in branches.items()}
    delta, dgates = _delta(do, branches, gates, dlse)
    grads = {"dq": _dq(do, q, branches, gates, delta, geometry, dq_tile)}
    if dgates is not None:
        grads["dgates"] = dgates
    for name, branch in branches.items():
        i = ("cmp", "slc", "win").index(name)
        rows = {
            "q_ptr": q,
            "do_ptr": do,
            "k_ptr": branch.k,
            "v_ptr": branch.v,
            "lse_ptr": branch.lse,
            "gates_ptr": q if gates is None else gates.view(-1)[i:],
            "delta_ptr": delta[i],
            "GATED": gates is not None,
        }
        if name == "slc":
            dk, dv = _selected_dkv(rows, q, branch, geometry)
        else:
            dk, dv = _range_dkv(rows, q, branch, geometry, compressed=name == "cmp")
        grads[f"dk_{name}"], grads[f"dv_{name}"] = dk, dv
    return grads


def _delta(
    do: Tensor, branches: dict[str, Branch], gates: Tensor | None, dlse: Tensor | None, R=16
) -> tuple[Tensor, Tensor | None]:
    num_rows = do.numel() // do.shape[-1]
    delta = torch.empty(3, num_rows, dtype=torch.float32, device=do.device)
    dgates = None if gates is None else torch.empty_like(gates)
    outputs = {
        f"o_{name}_ptr": branches[name].o if name in branches else do
        for name in ("cmp", "slc", "win")
    }
    if num_rows:
        launch(
            delta_kernel,
            (ceil_div(num_rows, R),),
            do_ptr=do,
            **outputs,
            gates_ptr=do if gates is None else gates,
            dlse_ptr=do if dlse is None else dlse.contiguous(),
            delta_ptr=delta,
            dgates_ptr=do if dgates is None else dgates,
            num_rows=num_rows,
            DV=do.shape[-1],
            DVP=next_power_of_2(do.shape[-1]),
            **{name.upper(): name in branches for name in ("cmp", "slc", "win")},
            GATED=gates is not None,
            DLSE=dlse is not None,
            R=R,
            num_warps=4,
        )
    return delta, dgates


def _dq(
    do: Tensor,
    q: Tensor,
    branches: dict[str, Branch],
    gates: Tensor | None,
    delta: Tensor,
    geometry: Geometry,
    tile: tuple[int, int, int, int],
) -> Tensor:
    BM, BN, num_warps, num_stages = tile
    dq = torch.empty_like(q)
    any_branch = next(iter(branches.values()))
    sizes = heads(q, any_branch.k, any_branch.v)
    tiles = QueryTiles.of(q, geometry.cu_seqlens, BM // sizes["GP"])
    slc, cmp = branches.get("slc"), branches.get("cmp")
    union = (q, q, q)
    if slc is not None and slc.block_indices is not None and q.numel():
        union = union_blocks(slc.block_indices, tiles, q.shape[-3])
    tensors = {}
    for name in ("cmp", "slc", "win"):
        branch = branches.get(name)
        for field in ("k", "v", "lse"):
            tensors[f"{field}_{name}_ptr"] = q if branch is None else getattr(branch, field)
    tokens = branches.get("slc") or branches.get("win")
    if q.numel():
        launch(
            dq_kernel,
            (tiles.num_tiles, sizes["K"]),
            q_ptr=q,
            do_ptr=do,
            **tensors,
            gates_ptr=q if gates is None else gates,
            delta_ptr=delta,
            dq_ptr=dq,
            blocks_ptr=union[0],
            bits_ptr=union[1],
            counts_ptr=union[2],
            **tiles.arguments(),
            num_rows=delta.shape[1],
            T_q=q.shape[-3],
            T_k=q.shape[-3] if tokens is None else tokens.k.shape[-3],
            T_c=0 if cmp is None else cmp.k.shape[-3],
            q_offset=geometry.q_offset,
            scale_log2=geometry.softmax_scale * LOG2_E,
            scale=geometry.softmax_scale,
            **sizes,
            BLOCK=geometry.compress_block_size,
            STRIDE=geometry.compress_stride,
            SELECT=geometry.block_size,
            WINDOW=geometry.window_size,
            U=union[0].shape[-1],
            BM=BM,
            BN=BN,
            BS=min(BN, geometry.block_size),
            CMP=cmp is not None,
            SLC=slc is not None,
            WIN="win" in branches,
            GATED=gates is not None,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return dq


def _range_dkv(
    rows: dict,
    q: Tensor,
    branch: Branch,
    geometry: Geometry,
    compressed: bool,
    BM=32,
    BN=64,
    num_warps=4,
    num_stages=3,
    segment=8192,
) -> tuple[Tensor, Tensor]:
    """Of compressed or window keys."""
    sizes = heads(q, branch.k, branch.v)
    block, stride = (
        (geometry.compress_block_size, geometry.compress_stride) if compressed else (1, 1)
    )
    num_parts = ceil_div(q.shape[-3], segment) if compressed and q.numel() else 1
    segment = segment if compressed else 1 << 30
    dtype = torch.float32 if compressed else q.dtype
    # Slots no sequence fills, and keys no query reaches, keep a gradient of zero.
    whole = geometry.cu_seqlens is None and not compressed
    make = torch.empty if whole and q.shape[-3] == branch.k.shape[-3] else torch.zeros
    dk = make(num_parts, *branch.k.shape, dtype=dtype, device=q.device)
    dv = make(num_parts, *branch.v.shape, dtype=dtype, device=q.device)
    if q.numel() and branch.k.numel():
        # Tiles are counted in tokens, over q's sequences, or over the keys when there are more of
        # them.
        num_tokens = (
            q.shape[-3] if geometry.cu_seqlens is not None else geometry.q_offset + q.shape[-3]
        )
        like = (
            q
            if geometry.cu_seqlens is not None
            else q.new_empty(0).expand(q.shape[0], num_tokens, 0)
        )
        tiles = QueryTiles.of(like, geometry.cu_seqlens, BN * stride)
        launch(
            range_dkv_kernel,
            (tiles.num_tiles, sizes["K"], num_parts),
            **rows,
            dk_ptr=dk,
            dv_ptr=dv,
            **tiles.arguments(),
            T_q=q.shape[-3],
            T_k=num_tokens,
            T_c=branch.k.shape[-3],
            q_offset=geometry.q_offset,
            scale_log2=geometry.softmax_scale * LOG2_E,
            scale=geometry.softmax_scale,
            segment=segment,
            part_dk=branch.k.numel(),
            part_dv=branch.v.numel(),
            **sizes,
            BLOCK=block,
            STRIDE=stride,
            WINDOW=0 if compressed else geometry.window_size,
            BM=BM,
            BN=BN,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    if num_parts == 1:
        return dk[0].to(q.dtype), dv[0].to(q.dtype)
    return dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)


def _selected_dkv(
    rows: dict,
    q: Tensor,
    branch: Branch,
    geometry: Geometry,
    BM=32,
    BN=64,
    num_warps=4,
    num_stages=3,
    segment=1024,
) -> tuple[Tensor, Tensor]:
    """Of the keys of selected blocks."""
    sizes = heads(q, branch.k, branch.v)
    num_kv_heads, size = sizes["K"], geometry.block_size
    dk, dv = torch.zeros_like(branch.k), torch.zeros_like(branch.v)
    assert branch.block_indices is not None, "the selected branch needs its block indices"
    if not q.numel():
        return dk, dv
    blocks = block_table(branch.k, q, geometry.cu_seqlens, size)
    num_lists = num_kv_heads * blocks.num_blocks
    entries, entry_offsets = invert(branch.block_indices, blocks, num_kv_heads)
    counts = entry_offsets[1:] - entry_offsets[:-1]
    part_offsets = torch.zeros_like(entry_offsets)
    part_offsets[1:] = torch.cumsum((counts + segment - 1) // segment, 0)
    max_parts = num_lists + branch.block_indices.numel() // segment
    parts_k = q.new_empty(max_parts, size, sizes["DK"], dtype=torch.float32)
    parts_v = q.new_empty(max_parts, size, sizes["DV"], dtype=torch.float32)
    BN = min(BN, size)
    where = {
        "part_offsets_ptr": part_offsets,
        "first_key_ptr": blocks.first_key,
        "num_keys_ptr": blocks.num_keys,
    }
    launch(
        selected_dkv_kernel,
        (max_parts, size // BN),
        **rows,
        dk_ptr=parts_k,
        dv_ptr=parts_v,
        entries_ptr=entries,
        entry_offsets_ptr=entry_offsets,
        **where,
        first_query_ptr=blocks.first_query,
        num_lists=num_lists,
        q_offset=geometry.q_offset,
        scale_log2=geometry.softmax_scale * LOG2_E,
        scale=geometry.softmax_scale,
        segment=segment,
        **sizes,
        SELECT=size,
        BM=BM,
        BN=BN,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    for parts, out in ((parts_k, dk), (parts_v, dv)):
        launch(
            sum_parts_kernel,
            (blocks.num_blocks, num_kv_heads, size // BN),
            parts_ptr=parts,
            out_ptr=out,
            **where,
            num_blocks=blocks.num_blocks,
            K=num_kv_heads,
            D=out.shape[-1],
            DP=next_power_of_2(out.shape[-1]),
            SELECT=size,
            BN=BN,
            num_warps=4,
        )
    return dk, dv


@dataclass(frozen=True)
class BlockTable:
    """Selection blocks of all sequences, numbered through.

    Sequence ``b``'s first number is ``cu_seqlens[b] // size + b``, which needs no lengths.
    ``first_key [2, blocks]``: row of the block's first key, and its position in the sequence.
    ``num_keys``: keys in it. ``first_query``: row of its sequence's first query. ``of_query``:
    number of the first block of each query's sequence.
    """

    num_blocks: int
    first_key: Tensor
    num_keys: Tensor
    first_query: Tensor
    of_query: Tensor


def block_table(k: Tensor, q: Tensor, cu_seqlens: Tensor | None, size: int) -> BlockTable:
    """Where each selection block lies."""
    device = q.device
    if cu_seqlens is None:
        batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
        per_seq = ceil_div(num_keys, size)
        numbers = torch.arange(batch * per_seq, device=device)
        seq, start = numbers // per_seq, numbers % per_seq * size
        first_key = seq * num_keys + start
        count = (num_keys - start).clamp(max=size)
        of_query = (torch.arange(batch, device=device) * per_seq).repeat_interleave(num_queries)
        return BlockTable(
            batch * per_seq, torch.stack((first_key, start)), count, seq * num_queries, of_query
        )
    bounds = cu_seqlens.long()
    num_seqs = bounds.shape[0] - 1
    first_number = bounds[:-1] // size + torch.arange(num_seqs, device=device)
    num_blocks = q.shape[0] // size + num_seqs
    numbers = torch.arange(num_blocks, device=device)
    seq = torch.searchsorted(first_number, numbers, right=True) - 1
    start = (numbers - first_number[seq]) * size
    count = (bounds[seq + 1] - bounds[seq] - start).clamp(0, size)
    rows = torch.arange(q.shape[0], device=device)
    of_query = first_number[torch.searchsorted(bounds[1:], rows, right=True)]
    return BlockTable(
        num_blocks, torch.stack((bounds[seq] + start, start)), count, bounds[seq], of_query
    )


def invert(block_indices: Tensor, blocks: BlockTable, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Query rows that chose each (kv head, block), ascending, and where each list starts (CSR)."""
    chosen = block_indices.view(-1, num_kv_heads, block_indices.shape[-1]).long()
    head = torch.arange(num_kv_heads, device=chosen.device)[None, :, None] * blocks.num_blocks
    num_lists = num_kv_heads * blocks.num_blocks
    lists = torch.where(chosen < 0, num_lists, chosen + blocks.of_query[:, None, None] + head)
    ranked, order = torch.sort(lists.int().view(-1), stable=True)
    entries = (order // (num_kv_heads * block_indices.shape[-1])).int()
    offsets = torch.searchsorted(
        ranked, torch.arange(num_lists + 1, device=chosen.device, dtype=torch.int32)
    )
    return entries, offsets
