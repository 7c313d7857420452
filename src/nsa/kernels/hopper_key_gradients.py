"""Backward, key side, on Hopper: ``dk`` and ``dv`` of a tile of keys, by two warpgroups.

The plain kernels of ``key_gradients`` wait for each product in turn. Here a warp of its own copies
query rows, and what the softmax needs of them, into a ring. Products run asynchronously, and two
warpgroups take turns, so that the softmax of one runs under the products of the other. Keys of a
range are shared out between them, 64 each; the queries that chose a selected block are dealt to
them one step after the other.

Rows of a step: ``BM / GP`` tokens times ``GP`` rows, of which the first ``G`` are its heads, or
``BM`` of the rows of one token. Head dims are cut into pieces of 64 columns, the widest that the
swizzle of shared memory holds, so that rows of single tokens can be placed next to each other
wherever they come from.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from nsa.kernels.hopper_tiles import await_turn, barrier, barriers, pass_turn, take_turns
from nsa.kernels.tiles import find_numbered, first_number, locate_tile, opaque

# Registers of a thread of the second warpgroup and of the warp that copies; the first one gets the
# rest. Of more than 256 columns the sums take so many that copying has to do with fewer.
REGISTERS = gl.constexpr([232, 40])
WIDE_REGISTERS = gl.constexpr([240, 24])

# Entries of SHAPE, the sizes that are compiled in; the head dims DK and DV count 64 columns each.
H = gl.constexpr(0)
G = gl.constexpr(1)
DK = gl.constexpr(2)
DV = gl.constexpr(3)
BM = gl.constexpr(4)
ST = gl.constexpr(5)
STRIDE = gl.constexpr(6)
BLOCK = gl.constexpr(7)
MODE = gl.constexpr(8)  # Which keys: one of the three below.
GP = gl.constexpr(9)  # Rows of a token: a power of two, G or the next.

COMPRESSED = gl.constexpr(0)
WINDOW = gl.constexpr(1)
SELECTED = gl.constexpr(2)


@gluon.jit
def _place(i, o_m, SHAPE: gl.constexpr):
    """Of each row ``o_m`` of step ``i``: its token, counted from the first, and its query head."""
    rows_a_token: gl.constexpr = SHAPE[GP]
    rows_a_step: gl.constexpr = SHAPE[BM]
    if rows_a_token <= rows_a_step:
        return i * (rows_a_step // rows_a_token) + o_m // rows_a_token, o_m % rows_a_token
    else:
        steps_a_token: gl.constexpr = rows_a_token // rows_a_step
        return i // steps_a_token + o_m // rows_a_token, i % steps_a_token * rows_a_step + o_m


@gluon.jit
def _tokens(i, source, SHAPE: gl.constexpr):
    """The token of each row of step ``i``, as its row of queries. The last one comes again."""
    rows_a_step: gl.constexpr = SHAPE[BM]
    _q, _do, _rows, entries_ptr, first, last, q_0, _k, _n, _offset, _window = source
    o_m = gl.arange(0, rows_a_step, gl.BlockedLayout([1], [32], [1], [0]))
    o_e = first + _place(i, o_m, SHAPE)[0]
    o_e = gl.maximum(gl.minimum(o_e, last - 1), 0)
    return gl.load(entries_ptr + o_e) if SHAPE[MODE] == SELECTED else q_0 + o_e


@gluon.jit
def _values(i, token, source, SHAPE: gl.constexpr):
    """What the softmax backward needs of each row of step ``i``: lse, delta, gate.

    Rows that do not exist get lse = inf, so that their probabilities are 0.
    """
    group: gl.constexpr = SHAPE[G]
    num_heads: gl.constexpr = SHAPE[H]
    rows_a_step: gl.constexpr = SHAPE[BM]
    _q, _do, rows_ptr, _entries, first, last, _q_0, i_k, num_rows, _offset, _window = source
    o_m = gl.arange(0, rows_a_step, gl.BlockedLayout([1], [32], [1], [0]))
    o_t, o_g = _place(i, o_m, SHAPE)
    exists = first + o_t < last
    if group < SHAPE[GP]:  # What belongs to no head is read where the last one's is.
        exists = exists & (o_g < group)
        o_g = gl.minimum(o_g, group - 1)
    p_row = rows_ptr + token.to(gl.int64) * num_heads + i_k * group + o_g
    lse = gl.load(p_row, mask=exists, other=float("inf"))
    p_row += num_rows
    delta = gl.load(p_row)
    p_row += num_rows
    gate = gl.load(p_row)
    return lse, delta, gate


@gluon.jit
def _produce(k_desc, v_desc, key_row, memory, source, steps, SHAPE: gl.constexpr):
    """The warp that copies: the keys, then the rows of each step and what is known of them.

    It reads entries two steps ahead and values one, so as to wait for neither.
    """
    group: gl.constexpr = SHAPE[G]
    num_heads: gl.constexpr = SHAPE[H]
    rows_a_step: gl.constexpr = SHAPE[BM]
    together: gl.constexpr = min(SHAPE[GP], rows_a_step)  # Rows of one token.
    PK: gl.constexpr = SHAPE[DK]
    PV: gl.constexpr = SHAPE[DV]
    stages: gl.constexpr = SHAPE[ST]
    parts: gl.constexpr = 1 if SHAPE[MODE] == SELECTED else 2
    keys, rows, values_s, full, empty, keys_full = memory
    k_s, v_s = keys
    q_s, do_s = rows
    position_s, lse_s, delta_s, gate_s = values_s
    q_desc, do_desc, _rows, _entries, _first, _last, q_0, i_k, _n, q_offset, _window = source
    o_m = gl.arange(0, rows_a_step, gl.BlockedLayout([1], [32], [1], [0]))
    tokens = _tokens(0, source, SHAPE)
    mbarrier.expect(keys_full, parts * 64 * (PK + PV) * 128)
    for c in gl.static_range(parts):
        key = key_row + c * 64
        for h in gl.static_range(PK):
            k_h = k_s.index(c * PK + h)
            tma.async_copy_global_to_shared(k_desc, [key, (i_k * PK + h) * 64], keys_full, k_h)
        for h in gl.static_range(PV):
            v_h = v_s.index(c * PV + h)
            tma.async_copy_global_to_shared(v_desc, [key, (i_k * PV + h) * 64], keys_full, v_h)
    following = _tokens(1, source, SHAPE)
    lse, delta, gate = _values(0, tokens, source, SHAPE)
    for i in range(steps):
        later = _tokens(i + 2, source, SHAPE)
        lse_1, delta_1, gate_1 = _values(i + 1, following, source, SHAPE)
        st = i % stages
        mbarrier.wait(empty.index(st), ((i // stages) & 1) ^ 1)
        mbarrier.expect(full.index(st), rows_a_step * (PK + PV) * 128)
        head = i_k * group + _place(i, 0, SHAPE)[1]
        for j in gl.static_range(rows_a_step // together):
            token = gl.max(gl.where(o_m // together == j, tokens, 0), 0)
            row = token * num_heads + head
            for h in gl.static_range(PK):
                to = q_s.index(st * PK + h).slice(j * together, together)
                tma.async_copy_global_to_shared(q_desc, [row, h * 64], full.index(st), to)
            for h in gl.static_range(PV):
                to = do_s.index(st * PV + h).slice(j * together, together)
                tma.async_copy_global_to_shared(do_desc, [row, h * 64], full.index(st), to)
        position_s.index(st).store(q_offset + (tokens - q_0))
        lse_s.index(st).store(lse)
        delta_s.index(st).store(delta)
        gate_s.index(st).store(gate)
        mbarrier.arrive(full.index(st), count=1)
        tokens = following
        following = later
        lse = lse_1
        delta = delta_1
        gate = gate_1


@gluon.jit
def _products(PART: gl.constexpr, held, st, memory, SHAPE: gl.constexpr):
    """Starts the products of the keys with the rows at place ``st``, and of the values."""
    rows_a_step: gl.constexpr = SHAPE[BM]
    keys, rows, _values_s, _full, _empty, _keys_full = memory
    k_s, v_s = keys
    q_s, do_s = rows
    PK: gl.constexpr = SHAPE[DK]
    PV: gl.constexpr = SHAPE[DV]
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows_a_step, 16])
    zero = gl.zeros([64, rows_a_step], gl.float32, score)
    s = warpgroup_mma_init(zero)
    for h in gl.static_range(PK):
        b_q = q_s.index(st * PK + h).permute((1, 0))
        b_k = held[h] if h < len(held) else k_s.index(PART * PK + h)
        s = warpgroup_mma(b_k, b_q, s, use_acc=h > 0, is_async=True)
    dp = warpgroup_mma_init(zero)
    for h in gl.static_range(PV):
        b_do = do_s.index(st * PV + h).permute((1, 0))
        dp = warpgroup_mma(v_s.index(PART * PV + h), b_do, dp, use_acc=h > 0, is_async=True)
    return s, dp


@gluon.jit
def _add(st, dk, dv, p, ds, memory, SHAPE: gl.constexpr):
    """Starts the products that add the rows at place ``st`` to ``dk`` and ``dv``."""
    q_s, do_s = memory[1]
    PK: gl.constexpr = SHAPE[DK]
    PV: gl.constexpr = SHAPE[DV]
    new_dv = ()
    for h in gl.static_range(PV):
        new_dv = new_dv + (warpgroup_mma(p, do_s.index(st * PV + h), dv[h], is_async=True),)
    new_dk = ()
    for h in gl.static_range(PK):
        new_dk = new_dk + (warpgroup_mma(ds, q_s.index(st * PK + h), dk[h], is_async=True),)
    return new_dk, new_dv


@gluon.jit
def _probabilities(s, st, masked, o_n, scale_log2, window, memory, SHAPE: gl.constexpr):
    """Of each key and row, and the gate of each row."""
    position_s, lse_s, _delta_s, gate_s = memory[2]
    column: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    lse = lse_s.index(st).load(column)
    s = s * scale_log2 - lse[None, :]
    if masked:
        position = position_s.index(st).load(column)
        if SHAPE[MODE] == WINDOW:
            # Unsigned, so that keys after the query, of negative age, are too old as well.
            age = (position[None, :] - o_n[:, None]).to(gl.uint32, bitcast=True)
            see = age < window.to(gl.uint32, bitcast=True)
        else:
            see = (o_n * SHAPE[STRIDE] + (SHAPE[BLOCK] - 1))[:, None] <= position[None, :]
        s = gl.where(see, s, float("-inf"))
    return gl.exp2(s), gate_s.index(st).load(column)


@gluon.jit
def _split(done, PK: gl.constexpr, PV: gl.constexpr):
    """The sums among what was waited for, after the scores."""
    dk = ()
    for h in gl.static_range(PK):
        dk = dk + (warpgroup_mma_init(done[1 + h]),)
    dv = ()
    for h in gl.static_range(PV):
        dv = dv + (warpgroup_mma_init(done[1 + PK + h]),)
    return dk, dv


@gluon.jit
def _zeros(PIECES: gl.constexpr, layout: gl.constexpr):
    pieces = ()
    for _ in gl.static_range(PIECES):
        pieces = pieces + (warpgroup_mma_init(gl.zeros([64, 64], gl.float32, layout)),)
    return pieces


@gluon.jit
def _consume(C: gl.constexpr, memory, out, masked, steps, n_0, window, SHAPE: gl.constexpr):
    """Warpgroup ``C``: its keys against its steps, the first ``masked`` of which need a mask.

    The sums of a step start together with the scores of the next one. None is under way where the
    loop turns: ptxas would then wait for each.
    """
    rows_a_step: gl.constexpr = SHAPE[BM]
    dk_ptr, dv_ptr, stride_dk, stride_dv, num_keys, scale_log2, scale = out
    keys, rows, values_s, full, empty, keys_full = memory
    k_s, _v_s = keys
    PK: gl.constexpr = SHAPE[DK]
    PV: gl.constexpr = SHAPE[DV]
    stages: gl.constexpr = SHAPE[ST]
    EACH: gl.constexpr = 2 if SHAPE[MODE] == SELECTED else 1
    PART: gl.constexpr = 0 if SHAPE[MODE] == SELECTED else C  # Of the keys.
    FROM: gl.constexpr = C if SHAPE[MODE] == SELECTED else 0
    grad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows_a_step, 16])
    column: gl.constexpr = gl.SliceLayout(0, score)
    operand: gl.constexpr = gl.DotOperandLayout(0, grad, 2)
    half: gl.constexpr = rows[0].dtype
    o_n = n_0 + PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, score))
    dk = _zeros(PK, grad)
    dv = _zeros(PV, grad)
    take_turns(C)
    mbarrier.wait(keys_full, 0)
    # Reading shared memory limits a step, so a piece of the keys stays in registers; where keys and
    # values have more than 256 columns, those would spill.
    held = ()
    for h in gl.static_range(0 if PK + PV > 4 else 1):
        held = held + (k_s.index(PART * PK + h).load(gl.DotOperandLayout(0, score, 2)),)
    mbarrier.wait(full.index(FROM), 0)
    s_0, dp_0 = _products(PART, held, FROM, memory, SHAPE)
    s_0 = warpgroup_mma_wait(PV, deps=(s_0,))
    p, gate = _probabilities(s_0, FROM, True, o_n, scale_log2, window, memory, SHAPE)
    delta = values_s[2].index(FROM).load(column)
    p_gated = gl.convert_layout((p * gate[None, :]).to(half), operand)
    dp_0 = warpgroup_mma_wait(0, deps=(dp_0,))
    ds = p * (dp_0 * gate[None, :] - delta[None, :])
    ds = gl.convert_layout(ds.to(half), operand)
    for i in range(FROM + EACH, steps, EACH):
        before = (i - EACH) % stages
        st = i % stages
        mbarrier.wait(full.index(st), (i // stages) & 1)
        await_turn(C)
        dk, dv = _add(before, dk, dv, p_gated, ds, memory, SHAPE)
        s, dp_i = _products(PART, held, st, memory, SHAPE)
        pass_turn(C)
        done = warpgroup_mma_wait(PV, deps=(s,) + dk + dv)
        dk, dv = _split(done, PK, PV)
        p, gate = _probabilities(done[0], st, i < masked, o_n, scale_log2, window, memory, SHAPE)
        p_gated = gl.convert_layout((p * gate[None, :]).to(half), operand)
        delta = values_s[2].index(st).load(column)
        # The products that read it have ended.
        mbarrier.arrive(empty.index(before), count=1)
        dp = warpgroup_mma_wait(0, deps=(dp_i,))
        ds = p * (dp * gate[None, :] - delta[None, :])
        ds = gl.convert_layout(ds.to(half), operand)
    last = (FROM + (steps - 1 - FROM) // EACH * EACH) % stages
    dk, dv = _add(last, dk, dv, p_gated, ds, memory, SHAPE)
    done = warpgroup_mma_wait(0, deps=dk + dv)
    o_row = opaque(PART * 64) + gl.arange(0, 64, gl.SliceLayout(1, grad))
    cols = gl.arange(0, 64, gl.SliceLayout(0, grad))
    keep = (o_row < num_keys)[:, None]
    for h in gl.static_range(PK):
        at = dk_ptr + o_row.to(gl.int64)[:, None] * stride_dk + (h * 64 + cols)[None, :]
        gl.store(at, (done[h] * scale).to(dk_ptr.dtype.element_ty), mask=keep)
    for h in gl.static_range(PV):
        at = dv_ptr + o_row.to(gl.int64)[:, None] * stride_dv + (h * 64 + cols)[None, :]
        gl.store(at, done[PK + h].to(dv_ptr.dtype.element_ty), mask=keep)


@gluon.jit
def _run(k_desc, v_desc, key_row, source, outs, masked, steps, n_0, SHAPE: gl.constexpr):
    """Buffers and barriers, and who works on them."""
    rows_a_step: gl.constexpr = SHAPE[BM]
    PK: gl.constexpr = SHAPE[DK]
    PV: gl.constexpr = SHAPE[DV]
    stages: gl.constexpr = SHAPE[ST]
    parts: gl.constexpr = 1 if SHAPE[MODE] == SELECTED else 2
    half: gl.constexpr = k_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(half, [parts * PK, 64, 64], tile)
    v_s = gl.allocate_shared_memory(half, [parts * PV, 64, 64], tile)
    q_s = gl.allocate_shared_memory(half, [stages * PK, rows_a_step, 64], tile)
    do_s = gl.allocate_shared_memory(half, [stages * PV, rows_a_step, 64], tile)
    position_s = gl.allocate_shared_memory(gl.int32, [stages, rows_a_step], plain)
    lse_s = gl.allocate_shared_memory(gl.float32, [stages, rows_a_step], plain)
    delta_s = gl.allocate_shared_memory(gl.float32, [stages, rows_a_step], plain)
    gate_s = gl.allocate_shared_memory(gl.float32, [stages, rows_a_step], plain)
    keys_full = barriers(1, 1).index(0)
    full = barriers(stages, 2)  # The copies and the values.
    empty = barriers(stages, parts)  # Of selected blocks one warpgroup reads it.
    fence_async_shared()
    barrier()
    values_s = (position_s, lse_s, delta_s, gate_s)
    # A warpgroup always has a step: rows that do not exist count for nothing.
    steps = gl.maximum(steps, 3 - parts)
    memory = ((k_s, v_s), (q_s, do_s), values_s, full, empty, keys_full)
    window = source[10]
    gl.warp_specialize(
        [
            (_consume, (0, memory, outs[0], masked, steps, n_0, window, SHAPE)),
            (_consume, (1, memory, outs[1], masked, steps, n_0, window, SHAPE)),
            (_produce, (k_desc, v_desc, key_row, memory, source, steps, SHAPE)),
        ],
        [4, 1],
        WIDE_REGISTERS if PK + PV > 4 else REGISTERS,
    )


@gluon.jit(
    do_not_specialize=[
        *("num_seqs", "T_q", "T_k", "T_c", "q_offset", "segment", "part_dk", "part_dv"),
        "window",
    ]
)
def hopper_range_dkv_kernel(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    rows_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_ptr,
    num_seqs,
    num_rows,
    T_q,
    T_k,
    T_c,
    q_offset,
    scale_log2,
    scale,
    segment,
    part_dk,
    part_dv,
    window,
    K: gl.constexpr,
    SHAPE: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Grid (key tiles, K, segments of queries): as ``range_dkv_kernel``, 128 keys a tile."""
    rows_a_token: gl.constexpr = SHAPE[GP]
    rows_a_step: gl.constexpr = SHAPE[BM]
    stride: gl.constexpr = SHAPE[STRIDE]
    block: gl.constexpr = SHAPE[BLOCK]
    i_k = gl.program_id(1)
    i_part = gl.program_id(2)
    s_0, token_0, q_0, c_0, n_k = locate_tile(
        gl.program_id(0),
        cu_seqlens_ptr,
        num_seqs,
        T_k,
        T_q,
        T_c,
        128 * stride,
        stride,
        PACKED,
    )
    n_q = n_k if PACKED else T_q
    n_0 = s_0 // stride
    if SHAPE[MODE] == WINDOW:
        key_0 = token_0
        count = n_k
        until = gl.minimum(s_0 + 127 + window - q_offset, n_q)
    else:
        key_0 = c_0
        count = gl.maximum(n_k - block + stride, 0) // stride
        until = n_q
    # Of the queries that see the tile, a segment.
    first = gl.maximum(s_0 + block - 1 - q_offset, 0) + i_part * segment
    last = gl.minimum(until, first + segment)
    nothing = s_0 >= n_k
    if PACKED:  # Short sequences have few segments; the sums of others are zeros as they are.
        nothing = nothing | (first >= last)
    if nothing:
        return
    steps = gl.cdiv(gl.maximum(last - first, 0) * rows_a_token, rows_a_step)
    clear = (n_0 + 127) * stride + block - 1  # The first query that sees every key.
    masked = gl.cdiv(gl.maximum(clear - q_offset - first, 0) * rows_a_token, rows_a_step)
    masked = gl.minimum(masked, steps)
    if SHAPE[MODE] == WINDOW:
        masked = steps  # Keys leave the window of later queries.
    row = (key_0 + n_0).to(gl.int64) * K + i_k
    dk_ptr += i_part.to(gl.int64) * part_dk + row * (SHAPE[DK] * 64)
    dv_ptr += i_part.to(gl.int64) * part_dv + row * (SHAPE[DV] * 64)
    strides = (K * SHAPE[DK] * 64, K * SHAPE[DV] * 64)
    out = (dk_ptr, dv_ptr, strides[0], strides[1], count - n_0, scale_log2, scale)
    q_0 = q_0.to(gl.int32)
    source = (
        q_desc, do_desc, rows_ptr, rows_ptr, first, last, q_0, i_k, num_rows, q_offset, window
    )  # fmt: skip
    key_row = (key_0 + n_0).to(gl.int32)
    _run(k_desc, v_desc, key_row, source, (out, out), masked, steps, n_0, SHAPE)


@gluon.jit(
    do_not_specialize=["num_seqs", "num_lists", "q_offset", "segment", "T_q", "T_k"],
)
def hopper_selected_dkv_kernel(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    rows_ptr,
    dk_ptr,
    dv_ptr,
    entries_ptr,
    entry_offsets_ptr,
    cu_seqlens_ptr,
    num_seqs,
    num_lists,
    num_rows,
    q_offset,
    scale_log2,
    scale,
    segment,
    T_q,
    T_k,
    K: gl.constexpr,
    SHAPE: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Grid (parts): as ``selected_dkv_kernel`` for blocks of 64 keys.

    Part ``i`` writes two sums, one of each warpgroup, to ``dk, dv [2 * parts, 64, D]``.
    """
    rows_a_token: gl.constexpr = SHAPE[GP]
    rows_a_step: gl.constexpr = SHAPE[BM]
    i_part = gl.program_id(0)
    i_list = find_numbered(entry_offsets_ptr, num_lists, i_part, segment)
    i_segment = i_part - first_number(entry_offsets_ptr, i_list, segment)
    first = gl.load(entry_offsets_ptr + i_list) + i_segment * segment
    last = gl.minimum(first + segment, gl.load(entry_offsets_ptr + i_list + 1))
    if first >= last:
        return
    num_blocks = num_lists // K
    i_k = i_list // num_blocks
    start, token_0, query_0, _, _ = locate_tile(
        i_list % num_blocks, cu_seqlens_ptr, num_seqs, T_k, T_q, 0, 64, 1, PACKED
    )
    key_0 = (token_0 + start).to(gl.int32)
    q_0 = query_0.to(gl.int32)
    steps = gl.cdiv((last - first) * rows_a_token, rows_a_step)
    # Only queries inside the block itself see a part of it, and they come first.
    inside = 64 if i_segment == 0 else 0
    masked = gl.minimum(gl.cdiv(inside * rows_a_token, 2 * rows_a_step) * 2, steps)
    dk: gl.constexpr = SHAPE[DK] * 64
    dv: gl.constexpr = SHAPE[DV] * 64
    dk_ptr += i_part.to(gl.int64) * (128 * dk)
    dv_ptr += i_part.to(gl.int64) * (128 * dv)
    a = (dk_ptr, dv_ptr, dk, dv, 64, scale_log2, scale)
    b = (dk_ptr + 64 * dk, dv_ptr + 64 * dv, dk, dv, 64, scale_log2, scale)
    source = (
        q_desc, do_desc, rows_ptr, entries_ptr, first, last, q_0, i_k, num_rows, q_offset, 0
    )  # fmt: skip
    _run(k_desc, v_desc, key_0, source, (a, b), masked, steps, start, SHAPE)
