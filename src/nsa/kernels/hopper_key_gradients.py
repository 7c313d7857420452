"""Backward, key side, on Hopper: ``dk`` and ``dv`` of a tile of keys, by two warpgroups.

The plain kernels of ``key_gradients`` wait for each product in turn. Here query rows come through a
ring of buffers (TMA), products run asynchronously, and two warpgroups work independently, so that
the softmax of one runs under the products of the other. Keys of a range are shared out between
them, 64 each; the queries that chose a selected block are dealt to them in turn.

A thread's registers hold the sums of ``dk`` and ``dv``, one for every two columns. More than 256
columns leave too few for products of two steps under way: a step then waits for its own, and what
it knows of its rows is kept once a token.

Rows of a step: ``BM / G`` tokens times ``G`` heads. Head dims are cut into pieces of 64 columns,
the widest that the swizzle of shared memory holds, so that rows of single tokens can be placed next
to each other wherever they come from.
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

from nsa.kernels.tiles import find_range, locate_tile

REGISTERS = gl.constexpr(256)  # Of a thread: two warpgroups share the 65,536 of a processor.

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

COMPRESSED = gl.constexpr(0)
WINDOW = gl.constexpr(1)
SELECTED = gl.constexpr(2)


@gluon.jit
def _fetch(i, pred, memory, source, SHAPE: gl.constexpr):
    """Starts the copies of step ``i``: query rows and their gradients."""
    group: gl.constexpr = SHAPE[G]
    num_heads: gl.constexpr = SHAPE[H]
    rows_a_step: gl.constexpr = SHAPE[BM]
    _keys, rows, full, _empty, _keys_full = memory
    q_s, do_s = rows
    q_desc, do_desc, _rows, entries_ptr, first, last, q_0, i_k, _n, _offset, _window = source
    tokens: gl.constexpr = rows_a_step // group
    PK: gl.constexpr = SHAPE[DK]
    PV: gl.constexpr = SHAPE[DV]
    st = i % SHAPE[ST]
    mbarrier.expect(full.index(st), rows_a_step * (PK + PV) * 128, pred=pred)
    for j in gl.static_range(tokens):
        # Rows past the last count for nothing: any row that exists will do.
        o_e = gl.maximum(gl.minimum(first + i * tokens + j, last - 1), 0)
        token = gl.load(entries_ptr + o_e) if SHAPE[MODE] == SELECTED else q_0 + o_e
        row = token * num_heads + i_k * group
        for h in gl.static_range(PK):
            to = q_s.index(st * PK + h).slice(j * group, group)
            tma.async_copy_global_to_shared(q_desc, [row, h * 64], full.index(st), to, pred=pred)
        for h in gl.static_range(PV):
            to = do_s.index(st * PV + h).slice(j * group, group)
            tma.async_copy_global_to_shared(do_desc, [row, h * 64], full.index(st), to, pred=pred)


@gluon.jit
def _tokens(i, source, layout: gl.constexpr, SHAPE: gl.constexpr):
    """Tokens of the rows of step ``i``, or -1: one for each row, or a tuple of one for each token.

    The tuple takes fewer registers.
    """
    group: gl.constexpr = SHAPE[G]
    rows_a_step: gl.constexpr = SHAPE[BM]
    count: gl.constexpr = rows_a_step // group
    _q, _do, _rows, entries_ptr, first, last, q_0, _k, _n, _offset, _window = source
    if SHAPE[DK] > 2:
        tokens = ()
        for j in gl.static_range(count):
            o_e = first + i * count + j
            if SHAPE[MODE] == SELECTED:
                tokens = tokens + (gl.load(entries_ptr + o_e, mask=o_e < last, other=-1),)
            else:
                tokens = tokens + (gl.where(o_e < last, q_0 + o_e, -1),)
        return tokens
    else:
        o_m = gl.arange(0, rows_a_step, layout)
        o_e = first + i * count + o_m // group
        if SHAPE[MODE] == SELECTED:
            return gl.load(entries_ptr + o_e, mask=o_e < last, other=-1)
        else:
            return gl.where(o_e < last, q_0 + o_e, -1)


@gluon.jit
def _rows(tokens, source, layout: gl.constexpr, SHAPE: gl.constexpr):
    """What ``_tokens`` returned, as the token and the address of each row."""
    group: gl.constexpr = SHAPE[G]
    num_heads: gl.constexpr = SHAPE[H]
    rows_a_step: gl.constexpr = SHAPE[BM]
    rows_ptr = source[2]
    i_k = source[7]
    o_m = gl.arange(0, rows_a_step, layout)
    o_g = o_m % group
    if SHAPE[DK] > 2:
        count: gl.constexpr = rows_a_step // group
        token = gl.full([rows_a_step], 0, gl.int32, layout) + tokens[0]
        p_row = rows_ptr + tokens[0].to(gl.int64) * num_heads + i_k * group + o_g
        for j in gl.static_range(1, count):
            p_j = rows_ptr + tokens[j].to(gl.int64) * num_heads + i_k * group + o_g
            token = gl.where(o_m // group >= j, tokens[j], token)
            p_row = gl.where(o_m // group >= j, p_j, p_row)
        return token, p_row
    else:
        return tokens, rows_ptr + tokens.to(gl.int64) * num_heads + i_k * group + o_g


@gluon.jit
def _step(
    PART: gl.constexpr, i, tokens, dk, dv, o_n, scale_log2, memory, source, SHAPE: gl.constexpr,
    MASK: gl.constexpr
):  # fmt: skip
    """Adds the rows of step ``i`` to ``dk`` and ``dv``, whose products are still under way."""
    rows_a_step: gl.constexpr = SHAPE[BM]
    keys, rows, full, _empty, _keys_full = memory
    k_s, v_s = keys
    q_s, do_s = rows
    q_0 = source[6]
    num_rows = source[8]
    q_offset = source[9]
    window = source[10]
    PK: gl.constexpr = SHAPE[DK]
    PV: gl.constexpr = SHAPE[DV]
    WIDE: gl.constexpr = PK > 2
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows_a_step, 16])
    grad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, grad, 2)
    column: gl.constexpr = gl.SliceLayout(0, score)
    # Rows that do not exist get lse = inf, so that their probabilities are 0.
    tokens, p_row = _rows(tokens, source, column, SHAPE)
    lse = gl.load(p_row, mask=tokens >= 0, other=float("inf"))
    delta = gl.load(p_row + num_rows, mask=tokens >= 0, other=0.0)
    gate = gl.load(p_row + 2 * num_rows.to(gl.int64), mask=tokens >= 0, other=0.0)
    st = i % SHAPE[ST]
    mbarrier.wait(full.index(st), (i // SHAPE[ST]) & 1)
    zero = gl.zeros([64, rows_a_step], gl.float32, score)
    s = warpgroup_mma_init(zero)
    for h in gl.static_range(PK):
        b_q = q_s.index(st * PK + h).permute((1, 0))
        s = warpgroup_mma(k_s.index(PART * PK + h), b_q, s, use_acc=h > 0, is_async=True)
    dp = warpgroup_mma_init(zero)
    for h in gl.static_range(PV):
        b_do = do_s.index(st * PV + h).permute((1, 0))
        dp = warpgroup_mma(v_s.index(PART * PV + h), b_do, dp, use_acc=h > 0, is_async=True)
    following = _tokens(i + (2 if SHAPE[MODE] == SELECTED else 1), source, column, SHAPE)
    # Also ends the products of the step before, which add to dk and dv.
    done = warpgroup_mma_wait(PV, deps=(s,) + dk + dv)
    p = gl.exp2(done[0] * scale_log2 - lse[None, :])
    if MASK:
        position = q_offset + (tokens - q_0)
        if SHAPE[MODE] == WINDOW:
            # Unsigned, so that keys after the query, of negative age, are too old as well.
            age = (position[None, :] - o_n[:, None]).to(gl.uint32, bitcast=True)
            see = age < window.to(gl.uint32, bitcast=True)
        else:
            see = (o_n * SHAPE[STRIDE] + (SHAPE[BLOCK] - 1))[:, None] <= position[None, :]
        p = gl.where(see, p, 0.0)
    p_gated = gl.convert_layout((p * gate[None, :]).to(q_s.dtype), operand)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    new_dv = ()
    for h in gl.static_range(PV):
        b_do = do_s.index(st * PV + h)
        new_dv = new_dv + (warpgroup_mma(p_gated, b_do, done[1 + PK + h], is_async=True),)
    ds = p * (dp * gate[None, :] - delta[None, :])
    ds = gl.convert_layout(ds.to(q_s.dtype), operand)
    new_dk = ()
    for h in gl.static_range(PK):
        b_q = q_s.index(st * PK + h)
        new_dk = new_dk + (warpgroup_mma(ds, b_q, done[1 + h], is_async=True),)
    if WIDE:
        new_dk, new_dv = _settle(new_dk, new_dv)
    return following, new_dk, new_dv


@gluon.jit
def _settle(dk, dv):
    """The sums once their products have ended."""
    done = warpgroup_mma_wait(0, deps=dk + dv)
    new_dk = ()
    for h in gl.static_range(len(dk)):
        new_dk = new_dk + (done[h],)
    new_dv = ()
    for h in gl.static_range(len(dv)):
        new_dv = new_dv + (done[len(dk) + h],)
    return new_dk, new_dv


@gluon.jit
def _refill(C: gl.constexpr, i, steps, memory, source, SHAPE: gl.constexpr):
    """Starts the copies of a later step into a stage that is free.

    In step ``i`` the products of the warpgroup's step before have ended. Of selected blocks each
    warpgroup has its own steps. Otherwise the first one fetches for both, two steps back, so that
    the other may lag behind by one.
    """
    stages: gl.constexpr = SHAPE[ST]
    _keys, _rows, _full, empty, _keys_full = memory
    new = i - 2 + stages
    pred = (i >= 2) & (new < steps)
    if SHAPE[MODE] == SELECTED:
        _fetch(new, pred, memory, source, SHAPE)
    else:
        mbarrier.arrive(empty.index((i - 1 + stages) % stages), count=1, pred=i > 0)
        if C == 0:
            mbarrier.wait(empty.index(new % stages), ((i - 2) // stages) & 1, pred=pred)
            _fetch(new, pred, memory, source, SHAPE)


@gluon.jit
def _zeros(PIECES: gl.constexpr, layout: gl.constexpr, WIDE: gl.constexpr):
    pieces = ()
    for _ in gl.static_range(PIECES):
        piece = gl.zeros([64, 64], gl.float32, layout)
        if WIDE:
            # Constants would be written again where no step is masked, and ptxas, which finds
            # that among the products, would wait for each of them.
            piece = gl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=f,f", [piece], dtype=gl.float32, is_pure=False, pack=1
            )
        pieces = pieces + (warpgroup_mma_init(piece),)
    return pieces


@gluon.jit
def _consume(C: gl.constexpr, memory, source, out, masked, steps, n_0, SHAPE: gl.constexpr):
    """Warpgroup ``C``: its keys against its steps, the first ``masked`` of which need a mask."""
    rows_a_step: gl.constexpr = SHAPE[BM]
    dk_ptr, dv_ptr, p_dk, p_dv, stride_dk, stride_dv, num_keys, scale_log2, scale = out
    PK: gl.constexpr = SHAPE[DK]
    PV: gl.constexpr = SHAPE[DV]
    stages: gl.constexpr = SHAPE[ST]
    EACH: gl.constexpr = 2 if SHAPE[MODE] == SELECTED else 1
    PART: gl.constexpr = 0 if SHAPE[MODE] == SELECTED else C  # Of the keys.
    FROM: gl.constexpr = C if SHAPE[MODE] == SELECTED else 0
    grad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows_a_step, 16])
    o_n = n_0 + PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, score))
    dk = _zeros(PK, grad, PK > 2)
    dv = _zeros(PV, grad, PK > 2)
    if SHAPE[MODE] == SELECTED or C == 0:
        for i in gl.static_range(FROM, stages, EACH):
            _fetch(i, i < steps, memory, source, SHAPE)
    tokens = _tokens(FROM, source, gl.SliceLayout(0, score), SHAPE)
    mbarrier.wait(memory[4], 0)
    for i in range(FROM, masked, EACH):
        tokens, dk, dv = _step(
            PART, i, tokens, dk, dv, o_n, scale_log2, memory, source, SHAPE, True
        )
        _refill(C, i, steps, memory, source, SHAPE)
    # No product may be under way from one loop into the next.
    done = warpgroup_mma_wait(0, deps=dk + dv)
    dk = ()
    for h in gl.static_range(PK):
        dk = dk + (warpgroup_mma_init(done[h]),)
    dv = ()
    for h in gl.static_range(PV):
        dv = dv + (warpgroup_mma_init(done[PK + h]),)
    for i in range(masked + FROM, steps, EACH):
        tokens, dk, dv = _step(
            PART, i, tokens, dk, dv, o_n, scale_log2, memory, source, SHAPE, False
        )
        _refill(C, i, steps, memory, source, SHAPE)
    done = warpgroup_mma_wait(0, deps=dk + dv)
    rows = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, grad))
    cols = gl.arange(0, 64, gl.SliceLayout(0, grad))
    keep = (rows < num_keys)[:, None]
    for h in gl.static_range(PK):
        p = dk_ptr + p_dk + rows.to(gl.int64)[:, None] * stride_dk + (h * 64 + cols)[None, :]
        gl.store(p, (done[h] * scale).to(dk_ptr.dtype.element_ty), mask=keep)
    for h in gl.static_range(PV):
        p = dv_ptr + p_dv + rows.to(gl.int64)[:, None] * stride_dv + (h * 64 + cols)[None, :]
        gl.store(p, done[PK + h].to(dv_ptr.dtype.element_ty), mask=keep)


@gluon.jit
def _first(memory, source, out, masked, steps, n_0, SHAPE: gl.constexpr):
    _consume(0, memory, source, out, masked, steps, n_0, SHAPE)


@gluon.jit
def _second(memory, source, out, masked, steps, n_0, SHAPE: gl.constexpr):
    _consume(1, memory, source, out, masked, steps, n_0, SHAPE)


@gluon.jit
def _run(k_desc, v_desc, key_row, source, outs, masked, steps, n_0, SHAPE: gl.constexpr):
    """Buffers and barriers, the keys, and the two warpgroups."""
    rows_a_step: gl.constexpr = SHAPE[BM]
    PK: gl.constexpr = SHAPE[DK]
    PV: gl.constexpr = SHAPE[DV]
    stages: gl.constexpr = SHAPE[ST]
    parts: gl.constexpr = 1 if SHAPE[MODE] == SELECTED else 2
    half: gl.constexpr = k_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    i_k = source[7]
    k_s = gl.allocate_shared_memory(half, [parts * PK, 64, 64], tile)
    v_s = gl.allocate_shared_memory(half, [parts * PV, 64, 64], tile)
    q_s = gl.allocate_shared_memory(half, [stages * PK, rows_a_step, 64], tile)
    do_s = gl.allocate_shared_memory(half, [stages * PV, rows_a_step, 64], tile)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], bar)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    for i in gl.static_range(stages):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(kv_full, count=1)
    fence_async_shared()
    mbarrier.expect(kv_full, parts * 64 * (PK + PV) * 128)
    for c in gl.static_range(parts):
        row = key_row + c * 64
        for h in gl.static_range(PK):
            to = k_s.index(c * PK + h)
            tma.async_copy_global_to_shared(k_desc, [row, (i_k * PK + h) * 64], kv_full, to)
        for h in gl.static_range(PV):
            to = v_s.index(c * PV + h)
            tma.async_copy_global_to_shared(v_desc, [row, (i_k * PV + h) * 64], kv_full, to)
    memory = ((k_s, v_s), (q_s, do_s), full, empty, kv_full)
    gl.warp_specialize(
        [
            (_first, (memory, source, outs[0], masked, steps, n_0, SHAPE)),
            (_second, (memory, source, outs[1], masked, steps, n_0, SHAPE)),
        ],
        [4],
        [REGISTERS],
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
    tile_offsets_ptr,
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
    group: gl.constexpr = SHAPE[G]
    rows_a_step: gl.constexpr = SHAPE[BM]
    tokens: gl.constexpr = rows_a_step // group
    stride: gl.constexpr = SHAPE[STRIDE]
    block: gl.constexpr = SHAPE[BLOCK]
    i_k = gl.program_id(1)
    i_part = gl.program_id(2)
    s_0, token_0, q_0, c_0, n_k = locate_tile(
        gl.program_id(0),
        cu_seqlens_ptr,
        tile_offsets_ptr,
        num_seqs,
        T_k,
        T_q,
        T_c,
        128 * stride,
        stride,
        PACKED,
    )
    if s_0 >= n_k:
        return
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
    first = gl.maximum(gl.maximum(s_0 + block - 1 - q_offset, 0), i_part * segment)
    first = first // tokens * tokens
    last = gl.minimum(until, (i_part + 1) * segment)
    steps = gl.maximum(last - first + tokens - 1, 0) // tokens
    clear = (n_0 + 127) * stride + block - 1  # The first query that sees every key.
    masked = gl.maximum(clear - q_offset - first + tokens - 1, 0) // tokens
    masked = gl.minimum(masked, steps)
    if SHAPE[MODE] == WINDOW:
        masked = steps  # Keys leave the window of later queries.
    row = (key_0 + n_0).to(gl.int64) * K + i_k
    p_dk = i_part.to(gl.int64) * part_dk + row * (SHAPE[DK] * 64)
    p_dv = i_part.to(gl.int64) * part_dv + row * (SHAPE[DV] * 64)
    if SHAPE[DK] > 2:
        dk_ptr += p_dk
        dv_ptr += p_dv
        p_dk = 0
        p_dv = 0
    strides = (K * SHAPE[DK] * 64, K * SHAPE[DV] * 64)
    out = (dk_ptr, dv_ptr, p_dk, p_dv, strides[0], strides[1], count - n_0, scale_log2, scale)
    q_0 = q_0.to(gl.int32)
    source = (
        q_desc, do_desc, rows_ptr, rows_ptr, first, last, q_0, i_k, num_rows, q_offset, window
    )  # fmt: skip
    key_row = (key_0 + n_0).to(gl.int32)
    _run(k_desc, v_desc, key_row, source, (out, out), masked, steps, n_0, SHAPE)


@gluon.jit(do_not_specialize=["num_lists", "q_offset", "segment"])
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
    part_offsets_ptr,
    first_key_ptr,
    first_query_ptr,
    num_lists,
    num_rows,
    q_offset,
    scale_log2,
    scale,
    segment,
    K: gl.constexpr,
    SHAPE: gl.constexpr,
):
    """Grid (parts): as ``selected_dkv_kernel`` for blocks of 64 keys.

    Part ``i`` writes two sums, one of each warpgroup, to ``dk, dv [2 * parts, 64, D]``.
    """
    group: gl.constexpr = SHAPE[G]
    rows_a_step: gl.constexpr = SHAPE[BM]
    tokens: gl.constexpr = rows_a_step // group
    i_part = gl.program_id(0)
    if i_part >= gl.load(part_offsets_ptr + num_lists):
        return
    i_list = find_range(part_offsets_ptr, num_lists, i_part)
    num_blocks = num_lists // K
    i_k = i_list // num_blocks
    i_block = i_list % num_blocks
    part_0 = gl.load(part_offsets_ptr + i_list)
    e_0 = gl.load(entry_offsets_ptr + i_list) + (i_part - part_0) * segment
    first = e_0.to(gl.int32)
    last = gl.minimum(e_0 + segment, gl.load(entry_offsets_ptr + i_list + 1)).to(gl.int32)
    key_0 = gl.load(first_key_ptr + i_block).to(gl.int32)
    q_0 = gl.load(first_query_ptr + i_block).to(gl.int32)
    start = gl.load(first_key_ptr + num_blocks + i_block).to(gl.int32)
    steps = (last - first + tokens - 1) // tokens
    # Only queries inside the block itself see a part of it, and they come first.
    inside = 64 if i_part == part_0 else 0
    masked = gl.minimum((inside + 2 * tokens - 1) // (2 * tokens) * 2, steps)
    if SHAPE[DK] > 2:
        masked = steps  # A second loop, without masks, would not fit the registers.
    p = i_part.to(gl.int64) * 128
    dk: gl.constexpr = SHAPE[DK] * 64
    dv: gl.constexpr = SHAPE[DV] * 64
    a = (dk_ptr, dv_ptr, p * dk, p * dv, dk, dv, 64, scale_log2, scale)
    b = (dk_ptr, dv_ptr, (p + 64) * dk, (p + 64) * dv, dk, dv, 64, scale_log2, scale)
    source = (
        q_desc, do_desc, rows_ptr, entries_ptr, first, last, q_0, i_k, num_rows, q_offset, 0
    )  # fmt: skip
    _run(k_desc, v_desc, key_0, source, (a, b), masked, steps, start, SHAPE)
