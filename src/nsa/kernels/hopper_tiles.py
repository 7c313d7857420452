"""What the Hopper kernels of the forward share. They are written in Gluon, waits by hand.

A program has a warp that copies tiles into a ring in shared memory and two warp groups that work on
them. It stays on its multiprocessor and takes every ``num_programs``-th query tile, so that copies
for the next tile run while the last one ends. ``full`` barriers say that a copy arrived, ``empty``
ones that every group is done with a place of the ring.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nsa.kernels.tiles import locate_tile, num_visible

# Triton 3.6 and 3.7 name it differently.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def exp2(x):
    """Flushes denormals, which saves three instructions."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def pack(b_p, dtype: gl.constexpr):
    """``[64, BN]`` float32 to ``[64, BN / 2]`` int32 of two 16-bit values each.

    Probabilities wait for their product across a step of the loop; single 16-bit values would be
    taken apart and put together again there.
    """
    low, high = gl.split(gl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // 2, 2]))
    PAIR: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + PAIR + ".f32 $0, $2, $1;",
        "=r,f,f",
        [low, high],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def unpack(b_p, dtype: gl.constexpr, layout: gl.constexpr):
    """What ``pack`` packed, ``[64, BN]``, as the left operand of a product."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;",
        "=h,=h,r",
        [b_p],
        dtype=(gl.int16, gl.int16),
        is_pure=True,
        pack=1,
    )
    b_p = gl.reshape(gl.join(low, high), [b_p.shape[0], b_p.shape[1] * 2])
    return gl.convert_layout(b_p.to(dtype, bitcast=True), layout)


@gluon.jit
def tile_steps(
    i_flat,
    last_tile,
    tiles,
    K: gl.constexpr,
    BQ: gl.constexpr,
    BN: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Where to work in turn ``i_flat`` of the grid, the longest tiles first.

    Returns kv head, first token in its sequence, first rows of q and slots, number of queries, keys
    that any of them sees, steps of keys, and how many steps, the last, need masks.
    """
    cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_c, q_offset = tiles
    i_tile = last_tile - i_flat // K
    t_0, q_0, _, c_0, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_q, T_c, BQ, STRIDE, PACKED
    )
    n_all = num_visible(q_offset + t_0, BLOCK, STRIDE)
    n_any = num_visible(q_offset + gl.minimum(t_0 + BQ, n_q) - 1, BLOCK, STRIDE)
    steps = gl.where(t_0 < n_q, (n_any + BN - 1) // BN, 0)
    masked = gl.maximum(steps - n_all // BN, 0)
    return i_flat % K, t_0, q_0, c_0.to(gl.int32), n_q, n_any, steps, masked
