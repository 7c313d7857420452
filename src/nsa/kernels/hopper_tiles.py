"""What the Hopper kernels of the forward share. They are written in Gluon, waits by hand.

A program has a warp that copies tiles into a ring in shared memory and two warp groups that work on
them. It stays on its multiprocessor and takes every ``num_programs``-th query tile, so that copies
for the next tile run while the last one ends. ``full`` barriers say that a copy arrived, ``empty``
ones that every group is done with a place of the ring.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from nsa.kernels.tiles import locate_tile, num_visible

# Triton 3.6 and 3.7 name it differently.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def barriers(places: gl.constexpr, arrivals: gl.constexpr):
    """One for each place of a ring; ``fence_async_shared`` and ``barrier`` follow the last."""
    bars = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(places):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def _execute(asm: gl.constexpr):
    """Runs an instruction that takes and gives nothing, where it stands."""
    gl.inline_asm_elementwise(
        asm + " mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def await_turn(HALF: gl.constexpr):
    """Waits with the products of a step until the other warp group has started its own.

    Then one group's products run under the other's softmax. Of the 256 threads of a named barrier
    one group's wait and the other's only arrive; a barrier in memory would cost each arrival two
    of its group. Triton's own have lower numbers.
    """
    _execute("bar.sync 8, 256;" if HALF == 0 else "bar.sync 9, 256;")


@gluon.jit
def pass_turn(HALF: gl.constexpr):
    """What every ``await_turn`` ends with."""
    _execute("bar.arrive 9, 256;" if HALF == 0 else "bar.arrive 8, 256;")


@gluon.jit
def take_turns(HALF: gl.constexpr):
    """What both warp groups begin with, once in a program: group 0 goes first."""
    if HALF == 1:
        pass_turn(HALF)


def _rows(pairs: int, swaps: int) -> gl.constexpr:
    """Where ``[64, pairs]`` 32-bit values lie that ``pack`` made of a warp group's accumulator.

    Of every quad of threads, one has values 0, 4, 8, .. of two rows. Swapping two bits of the
    column between threads and registers gives each 4 neighbours, 16 bytes.
    """
    columns = [[0, 1 << i] for i in range((pairs - 1).bit_length())]
    for i in range(swaps):
        columns[i], columns[i + 2] = columns[i + 2], columns[i]
    registers = [*columns[2 : 2 + swaps], [8, 0], *columns[2 + swaps :]]
    return gl.constexpr(
        gl.DistributedLinearLayout(
            reg_bases=registers,
            lane_bases=[*columns[:2], [1, 0], [2, 0], [4, 0]],
            warp_bases=[[16, 0], [32, 0]],
            block_bases=[],
            shape=[64, pairs],
        )
    )


# One swap at a time is made by shuffles; two would go through shared memory.
HALFWAY_32, WIDE_32 = _rows(32, 1), _rows(32, 2)
HALFWAY_64, WIDE_64 = _rows(64, 1), _rows(64, 2)


@gluon.jit
def _keep(x):
    """``x``; two conversions with this in between stay two."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def widen(b_x):
    """Packed values as ``store`` writes them 16 bytes at a time."""
    PAIRS: gl.constexpr = b_x.shape[1]
    b_x = gl.convert_layout(b_x, HALFWAY_64 if PAIRS == 64 else HALFWAY_32)
    return gl.convert_layout(_keep(b_x), WIDE_64 if PAIRS == 64 else WIDE_32)


@gluon.jit
def wide_places(p_row, exists, stride: gl.constexpr, PAIRS: gl.constexpr):
    """Where ``widen``'s values of 64 rows go, ``stride`` pairs apart, and which of them exist."""
    layout: gl.constexpr = WIDE_64 if PAIRS == 64 else WIDE_32
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    o_d = gl.arange(0, PAIRS, gl.SliceLayout(0, layout))
    places = gl.convert_layout(p_row, rows)[:, None] * stride + o_d[None, :]
    return places, gl.convert_layout(exists.to(gl.int32), rows)[:, None] != 0


@gluon.jit
def token_of_row(o_m, G: gl.constexpr, GP: gl.constexpr):
    """The token of rows ``o_m`` of a tile, in which each has ``GP`` rows for its ``G`` heads.

    Rows that are no head's hold the queries of the next kv head, or zeros. They are of a token that
    no sequence has, so that nothing is read or written for them.
    """
    o_q = o_m // GP
    if G < GP:
        o_q = gl.where(o_m % GP < G, o_q, 1 << 30)
    return o_q


@gluon.jit
def exp2(x):
    """Flushes denormals, which saves three instructions."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def fold(b_x, MAX: gl.constexpr):
    """The maximum of each row, or its sum, as far as a thread gets alone: ``[64, 4]``.

    Four threads share a row of a product. ``gl.max`` and ``gl.sum`` would make chains of one
    operation after the other, here each thread has several on their way, and a sum that only goes
    on to the next step needs no exchange between threads.
    """
    b_low, b_high = gl.split(gl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2]))
    b_x = gl.maximum(b_low, b_high) if MAX else b_low + b_high
    for _ in gl.static_range(8):
        if b_x.shape[1] > 4:
            halves = gl.reshape(b_x, [b_x.shape[0], 2, b_x.shape[1] // 2])
            b_low, b_high = gl.split(gl.permute(halves, (0, 2, 1)))
            b_x = gl.maximum(b_low, b_high) if MAX else b_low + b_high
    return b_x


@gluon.jit
def scale_parts(b_parts, b_rows):
    """Sums ``[64, 4]`` of ``fold`` times a value of each row."""
    return b_parts * gl.convert_layout(b_rows, gl.SliceLayout(1, b_parts.type.layout))[:, None]


@gluon.jit
def join_parts(b_parts, b_like, MAX: gl.constexpr):
    """What ``fold`` left to the four threads of a row, as rows like ``b_like``."""
    b_x = gl.max(b_parts, 1) if MAX else gl.sum(b_parts, 1)
    return gl.convert_layout(b_x, b_like.type.layout)


def _unless_one(values: int) -> gl.constexpr:
    """PTX that multiplies ``values`` of a thread by as many factors, or skips that if all are 1.

    The factors are those of two rows, in turns of two values.
    """
    factors = range(2 * values, 3 * values)
    lines = [f"mov.f32 ${i}, ${i + values};" for i in range(values)]
    lines += [f"setp.eq.f32 p, ${factors[0]}, 0f3F800000;"]
    lines += [f"setp.eq.and.f32 p, ${factors[2]}, 0f3F800000, p;"]
    lines += ["vote.sync.all.pred p, p, 0xFFFFFFFF;", "@p bra DONE;"]
    lines += [f"mul.f32 ${i}, ${i}, ${factors[i]};" for i in range(values)]
    return gl.constexpr("{ .reg .pred p; " + " ".join(lines) + " DONE: }")


def _operands(values: int) -> gl.constexpr:
    return gl.constexpr(",".join(["=&f"] * values + ["f"] * (2 * values)))


RESCALE_32, RESCALE_64 = _unless_one(32), _unless_one(64)
OPERANDS_32, OPERANDS_64 = _operands(32), _operands(64)


@gluon.jit
def rescale(b_acc, b_alpha):
    """``b_acc * b_alpha[:, None]`` of an accumulator of 64 rows, skipped where that is ``b_acc``.

    It branches, so no ``wgmma`` may be in flight, and it stays where it stands.
    """
    b_alpha = gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout))[:, None]
    _, b_alpha = gl.broadcast(b_acc, b_alpha)
    return gl.inline_asm_elementwise(
        RESCALE_64 if b_acc.shape[1] == 128 else RESCALE_32,
        OPERANDS_64 if b_acc.shape[1] == 128 else OPERANDS_32,
        [b_acc, b_alpha],
        dtype=gl.float32,
        is_pure=False,
        pack=64 if b_acc.shape[1] == 128 else 32,
    )


@gluon.jit
def pack(b_p, dtype: gl.constexpr):
    """``[64, BN]`` float32 to ``[64, BN / 2]`` int32 of two 16-bit values each.

    Probabilities wait for their product across a step of the loop; single 16-bit values would be
    taken apart and put together again there.
    """
    low, high = gl.split(gl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // 2, 2]))
    return pack_pair(low, high, dtype)


@gluon.jit
def pack_pair(low, high, dtype: gl.constexpr):
    """Two float32 tensors to the int32 of their 16-bit values."""
    PAIR: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    asm: gl.constexpr = "cvt.rn." + PAIR + ".f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(
        asm, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def floats(b_x, dtype: gl.constexpr):
    """The reverse of ``pack_pair``."""
    HALF: gl.constexpr = "bf16" if dtype == gl.bfloat16 else "f16"
    return gl.inline_asm_elementwise(
        "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32." + HALF + " $0, l; "
        "cvt.f32." + HALF + " $1, h; }",
        "=f,=f,r",
        [b_x],
        dtype=(gl.float32, gl.float32),
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
    cu_seqlens_ptr, num_seqs, T_q, T_c, q_offset = tiles
    i_tile = last_tile - i_flat // K
    t_0, q_0, _, c_0, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, num_seqs, T_q, T_q, T_c, BQ, STRIDE, PACKED
    )
    n_all = num_visible(q_offset + t_0, BLOCK, STRIDE)
    n_any = num_visible(q_offset + gl.minimum(t_0 + BQ, n_q) - 1, BLOCK, STRIDE)
    steps = gl.where(t_0 < n_q, (n_any + BN - 1) // BN, 0)
    masked = gl.maximum(steps - n_all // BN, 0)
    return i_flat % K, t_0, q_0, c_0.to(gl.int32), n_q, n_any, steps, masked


@gluon.jit
def unlike(x):
    """``x``, an int32 from 0 on that the compiler does not know to be the same in all threads.

    What is loaded from places computed with it is on its way until it is used. Else it goes to a
    uniform register, and the instruction that takes it there waits for it right after the load.
    """
    asm: gl.constexpr = (
        "{ .reg .pred p; .reg .s32 n; mov.u32 n, %laneid; sub.s32 n, n, 32; "
        "setp.gt.s32 p, n, $1; selp.s32 n, 1, 0, p; add.s32 $0, $1, n; }"
    )
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def alike(condition):
    """A condition that is the same in all threads of a warp, as one that the compiler knows so."""
    asm: gl.constexpr = (
        "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.any.pred p, p, -1; selp.b32 $0, 1, 0, p; }"
    )
    x = condition.to(gl.int32)
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1) != 0


@gluon.jit
def union_entry(j, count, i_list, blocks_ptr, bits_ptr, width):
    """Entry ``j`` of a tile's union list as it lies in memory: block, sum of bits up to its own.

    Loaded a step ahead; what is computed from it at once would wait for it. ``tokens_of`` gives the
    bits. Beyond the list it is 0, 0. See ``union_blocks_kernel``.
    """
    block = gl.load(blocks_ptr + i_list * width + j, mask=j < count, other=0)
    return block, gl.load(bits_ptr + i_list * (width + 1) + j + 1, mask=j < count, other=0)


@gluon.jit
def tokens_of(entry, seen):
    """A bit for each token of the tile that chose the block; ``seen`` is the sum before it."""
    return (entry[1] - seen).to(gl.int32)


@gluon.jit
def same(x):
    """``x``, an int32 that all threads of a warp share, as one of which the compiler knows it."""
    return gl.inline_asm_elementwise(
        "redux.sync.or.b32 $0, $1, -1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )
