"""The compiled kernels on a GPU against the float64 oracle: values and every gradient."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from tests import cases, comparison
from tests.cases import Case
from tests.kernels.interpret import CASES as EDGES

from nsa import NSAConfig, ops

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
PAPER = NSAConfig.paper()
ATTENDED = ("q", "k_cmp", "v_cmp")
# What is compiled in, with the dtype: heads, dims and geometry. Everything else is drawn anew for
# each case, so that hundreds of cases take few compilations, and no two tests the same.
COMPILED = [
    Case(name="tiny", lengths=(), group=2, kv_heads=2, dk=16, dv=16, config=NSAConfig.tiny()),
    Case(name="group-1", lengths=(), group=1, kv_heads=2, dk=64, dv=64, config=NSAConfig.tiny()),
    Case(name="group-3", lengths=(), group=3, kv_heads=1, dk=24, dv=40, config=NSAConfig.tiny()),
    Case(
        name="group-16", lengths=(), group=16, kv_heads=1, dk=128, dv=128, config=NSAConfig.tiny()
    ),
    Case(name="hopper", lengths=(), group=8, kv_heads=2, dk=128, dv=64, config=PAPER),
    Case(name="hopper-padded", lengths=(), group=5, kv_heads=2, dk=64, dv=128, config=PAPER),
    Case(
        name="wide-keys", lengths=(), group=4, kv_heads=1, dk=192, dv=128, config=NSAConfig.tiny()
    ),
    Case(name="group-64", lengths=(), group=64, kv_heads=1, dk=32, dv=32, config=NSAConfig.tiny()),
    Case(name="dim-256", lengths=(), group=2, kv_heads=1, dk=256, dv=256, config=PAPER),
    Case(name="dim-96", lengths=(), group=8, kv_heads=1, dk=96, dv=64, config=cases.WIDE),
]
ROWS = 300  # Queries times heads of one case: the oracle is a loop in Python.


@st.composite
def drawn(draw: st.DrawFn, base: Case) -> Case:
    """Lengths, packing, offset and values."""
    packed = draw(st.booleans())
    length = st.integers(0, min(100, max(16, ROWS // (base.group * base.kv_heads))))
    if packed:
        lengths = tuple(draw(st.lists(length, min_size=1, max_size=3)))
    else:
        lengths = (draw(length),) * draw(st.integers(1, 2))
    return replace(
        base,
        lengths=lengths,
        packed=packed,
        offset=0 if packed else draw(st.sampled_from([0, 0, 7, 70])),
        spread=draw(st.sampled_from([0.3, 1.0, 1.0, 30.0])),
        seed=draw(st.integers(0, 2**20)),
    )


def check_all(case: Case) -> None:
    """Every attention operation on one case."""

    def kernels(name):
        return functools.partial(getattr(ops, name), backend="kernel")

    blocks = cases.check_select_blocks(kernels("select_blocks"), case, "cuda", exact=False)
    for name in ("compressed_attention", "selected_attention", "window_attention"):
        getattr(cases, f"check_{name}")(kernels(name), case, "cuda")
    # The op chooses from its own log-sum-exps, not the oracle's: near-ties are judged above.
    tensors = {name: x.to("cuda", case.dtype) for name, x in case.tensors().items()}
    where = case.where("cuda")
    own = chosen_blocks(*(tensors[name] for name in ATTENDED), config=case.config, **where)
    cases.check_near_ties(case, own.cpu(), blocks)
    cases.check_nsa_attention(kernels("nsa_attention"), case, "cuda", blocks=own.cpu())


@pytest.mark.timeout(900)  # Most of it is compilation.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", COMPILED, ids=lambda case: case.name)
def test_generated_shapes(base, dtype):
    """More than 500 cases in all."""
    seen = set()

    @seed(2 * COMPILED.index(base) + DTYPES.index(dtype))
    @settings(max_examples=32)
    @given(drawn(replace(base, dtype=dtype)))
    def run(case):
        seen.add(repr(case))
        check_all(case)

    run()
    assert len(seen) >= 30


# Of float32 inputs with logits of 1e4 the saved float32 lse is too coarse for the gradients.
HUGE = [
    replace(case, dtype=torch.bfloat16) if case.dtype == torch.float32 else case
    for case in cases.HUGE
]
NAMED = EDGES + HUGE + cases.DTYPES[1:]


@pytest.mark.parametrize("case", NAMED, ids=lambda case: f"{case.name}-{case.dtype}")
def test_named_cases(case):
    check_all(case)


@pytest.mark.parametrize("case", EDGES, ids=lambda case: case.name)
def test_edges_in_bfloat16(case):
    check_all(replace(case, dtype=torch.bfloat16))


# Longer than the oracle's loops allow, at the shapes that have kernels of their own on Hopper.
LONG = [
    Case(name="paper-d128", lengths=(1501,), group=16, kv_heads=2, dk=128, dv=128),
    Case(name="paper", lengths=(1100, 1100), group=16, kv_heads=1, dk=192, dv=128),
    Case(name="paper-packed", lengths=(1203, 0, 1, 517), packed=True, group=16, dk=192, dv=128),
    Case(name="packed", lengths=(31, 0, 1500, 969), packed=True, group=8, dk=128, dv=128),
    Case(name="offset", lengths=(400, 400), offset=1301, group=8, dk=64, dv=128),
    Case(name="covered", lengths=(1000,), group=16, kv_heads=2, dk=128, dv=128),
    Case(name="group-32", lengths=(1701,), group=32, kv_heads=1, dk=128, dv=64),
    Case(name="group-64", lengths=(1301,), group=64, kv_heads=1, dk=64, dv=64),
    Case(name="group-64-d128", lengths=(1201,), group=64, kv_heads=1, dk=128, dv=128),
    Case(name="group-64-packed", lengths=(1100, 0, 401), packed=True, group=64, dk=192, dv=128),
    Case(name="group-4", lengths=(1301,), group=4, dk=128, dv=128),
    Case(name="group-1", lengths=(2049,), group=1, kv_heads=3, dk=64, dv=64),
    Case(name="group-12", lengths=(1201,), group=12, kv_heads=1, dk=128, dv=128),
    Case(name="group-7", lengths=(1203, 0, 1, 517), packed=True, group=7, dk=128, dv=128),
    Case(name="wide-group-1", lengths=(1301,), group=1, kv_heads=3, dk=192, dv=128),
    Case(name="wide-group-2", lengths=(1203, 0, 1, 517), packed=True, group=2, dk=192, dv=128),
    Case(name="wide-group-4", lengths=(1100, 1100), group=4, kv_heads=1, dk=192, dv=128),
    Case(name="group-24", lengths=(1301,), group=24, kv_heads=1, dk=128, dv=128),
    Case(
        name="group-48", lengths=(1100, 0, 401), packed=True, group=48, kv_heads=1, dk=128, dv=128
    ),
    Case(name="wide-group-5", lengths=(1100, 1100), group=5, kv_heads=3, dk=192, dv=128),
    Case(name="wide-group-12", lengths=(1203, 0, 1, 517), packed=True, group=12, dk=192, dv=128),
    Case(name="wide-group-24", lengths=(1301,), group=24, kv_heads=1, dk=192, dv=128),
    Case(name="wide-group-48", lengths=(1100,), group=48, kv_heads=1, dk=192, dv=128),
    Case(name="broad-group-1", lengths=(1203, 0, 1, 517), packed=True, group=1, dk=256, dv=256),
    Case(name="broad-group-8", lengths=(1301,), group=8, dk=256, dv=256),
    Case(name="broad-group-12", lengths=(1100, 1100), group=12, kv_heads=1, dk=256, dv=256),
    Case(name="broad-group-48", lengths=(1100,), group=48, kv_heads=1, dk=256, dv=256),
    Case(name="dims-96-192", lengths=(1201,), group=4, kv_heads=1, dk=96, dv=192),
    Case(name="dims-64-256", lengths=(1201,), group=2, kv_heads=1, dk=64, dv=256),
    Case(name="dims-256-96", lengths=(1201,), group=2, kv_heads=1, dk=256, dv=96),
]
# Around compressed blocks, steps of keys, tiles, the window, and the longest selection.
TILE_EDGES = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 1089)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_long_cases_match_the_reference_in_float64(case, dtype):
    check_long(replace(case, dtype=dtype))


@pytest.mark.parametrize(
    "heads",
    [
        *((16, 64, 64), (16, 128, 128), (16, 192, 128), (6, 128, 128)),
        *((2, 128, 128), (1, 192, 128), (4, 192, 128)),
    ],
    ids=lambda heads: "-".join(map(str, heads)),
)
@pytest.mark.parametrize("lengths", [*((n,) for n in TILE_EDGES), (*TILE_EDGES, 0)], ids=str)
def test_edges_of_tiles(lengths, heads):
    group, dk, dv = heads
    packed = len(lengths) > 1
    case = Case(name="", lengths=lengths, packed=packed, group=group, kv_heads=1, dk=dk, dv=dv)
    check_long(replace(case, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads",
    [(16, 64, 64), (16, 128, 128), (64, 192, 128), (2, 128, 128), (12, 192, 128)],
    ids=lambda heads: "-".join(map(str, heads)),
)
def test_packed_sequences_that_fit_the_selection(heads, dtype):
    """Many of them: together they do not fit it."""
    group, dk, dv = heads
    lengths = (1024, 0, 1, 900, 1024, 64, 333, 1023)
    case = Case(name="", lengths=lengths, packed=True, group=group, kv_heads=1, dk=dk, dv=dv)
    case = replace(case, config=PAPER, dtype=dtype, spread=0.2)
    check_long(case, functools.partial(attend, max_seqlen=1024))
    tensors = {name: x.cuda().to(dtype) for name, x in case.tensors().items()}
    inputs = [tensors[name] for name in ATTENDED]
    where = case.where("cuda")
    _, lse = ops.compressed_attention(*inputs, **compression(PAPER), **where)
    chosen = [
        ops.select_blocks(*inputs[:2], lse, config=PAPER, max_seqlen=longest, **where)
        for longest in (1024, 1025, None)
    ]
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])


@pytest.mark.parametrize("group", range(1, 65))
def test_every_group_size(group):
    check_long(Case(name="", lengths=(1153,), group=group, dk=64, dv=64, dtype=torch.bfloat16))


def test_many_chunks_of_scores():
    """And many segments of queries, in float32."""
    check_long(Case(name="", lengths=(20000,), group=2, kv_heads=1, dk=32, dv=32))


@pytest.mark.parametrize("which", [*cases.NSA_INPUTS, "do"])
def test_memory_that_the_copy_engine_cannot_read(which):
    def misaligned(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)

    def tested(*values, **where):
        values = [
            misaligned(x) if name == which else x
            for name, x in zip(cases.NSA_INPUTS, values, strict=True)
        ]
        o = attend(*values, **where)
        return misaligned(o) if which == "do" else o

    case = Case(name="", lengths=(1101,), group=16, kv_heads=1, dk=128, dv=128)
    check_long(replace(case, dtype=torch.bfloat16), tested)


def attend(*values, **where):
    return ops.nsa_attention(*values, config=PAPER, **where)


def check_long(case: Case, op=attend) -> None:
    """The whole op at the paper's geometry, and log-sum-exps."""
    case = replace(case, config=PAPER, spread=0.2)
    tensors = {name: x.cuda() for name, x in case.tensors().items()}
    where = case.where("cuda")
    chosen = chosen_blocks(*(tensors[name].to(case.dtype) for name in ATTENDED), **where)

    given = {name: tensors[name] for name in cases.NSA_INPUTS}
    tested, truth = functools.partial(op, **where), reference_over(chosen, **where)
    comparison.compare(tested, truth, given, dtype=case.dtype, device="cuda")
    tested = functools.partial(ops.compressed_attention, **compression(PAPER), **where)
    truth = functools.partial(tested, backend="reference")
    given = {name: tensors[name] for name in ATTENDED}
    comparison.compare(tested, truth, given, dtype=case.dtype, device="cuda")


def compression(config):
    """How blocks of tokens are compressed, as arguments of an operation."""
    return {
        "compress_block_size": config.compress_block_size,
        "compress_stride": config.compress_stride,
    }


def chosen_blocks(q, k_cmp, v_cmp, *, config=PAPER, **where):
    """What the op chooses from its own log-sum-exps."""
    _, lse = ops.compressed_attention(q, k_cmp, v_cmp, **compression(config), **where)
    return ops.select_blocks(q, k_cmp, lse, config=config, **where)


def reference_over(chosen, **where):
    """The op by the reference, over blocks that are given: near-ties are judged elsewhere."""
    plain = {"backend": "reference", **where}

    def truth(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates):
        o_cmp, _ = ops.compressed_attention(q, k_cmp, v_cmp, **compression(PAPER), **plain)
        o_slc = ops.selected_attention(
            q, k_slc, v_slc, chosen, block_size=PAPER.block_size, **plain
        )
        o_win = ops.window_attention(q, k_win, v_win, window_size=PAPER.window_size, **plain)
        return sum(gates[..., i, None] * o for i, o in enumerate((o_cmp, o_slc, o_win)))

    return truth


@pytest.mark.timeout(600)  # It takes 80 GB, of a GPU that other tests may be using.
def test_a_million_tokens():
    """Queries lie beyond 2^31 elements."""
    check_last_rows(2**20, "cuda")


def check_last_rows(total: int, device: str) -> None:
    """The whole op on 32 query and 2 kv heads; only the last rows have weight in gradients."""
    last, dtype = slice(total - 64, total), torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(1, *shape, generator=generator, dtype=dtype, device=device)

    tensors = {"q": draw(total, 32, 128).mul_(0.2)}
    for branch, count in (("cmp", PAPER.num_compressed(total)), ("slc", total), ("win", total)):
        tensors |= {f"{side}_{branch}": draw(count, 2, 128) for side in "kv"}
    tensors["gates"] = draw(total, 32, 3)
    found = comparison.values_and_gradients(lambda *values: attend(*values)[:, last], tensors, 0)
    assert not found["dq"][:, :-64].any()
    for name in ("q", "gates"):
        tensors[name] = tensors[name][:, last].clone()
        found[f"d{name}"] = found[f"d{name}"][:, last].clone()
    where = {"q_offset": total - 64}
    truth = reference_over(chosen_blocks(*(tensors[name] for name in ATTENDED), **where), **where)
    exact = {name: x.double() for name, x in tensors.items()}
    comparison.check_close(found, truth, exact, dtype=dtype, seed=0)


def paper_inputs(seq, dtype=torch.bfloat16, heads=(16, 1), dim=64):
    torch.manual_seed(0)
    num_heads, num_kv_heads = heads

    def draw(*shape):
        return torch.randn(1, *shape, dtype=dtype, device="cuda", requires_grad=True)

    blocks = PAPER.num_compressed(seq)
    tensors = [draw(seq, num_heads, dim)]
    for count in (blocks, blocks, seq, seq, seq, seq):
        tensors.append(draw(count, num_kv_heads, dim))
    return [*tensors, draw(seq, num_heads, 3)]


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_many_runs_are_bitwise_equal(case):
    """A race shows in few runs of many."""
    tensors = replace(case, config=PAPER, dtype=torch.bfloat16, spread=0.2).tensors()
    leaves = [
        tensors[name].to("cuda", torch.bfloat16).requires_grad_() for name in cases.NSA_INPUTS
    ]

    def run():
        o = ops.nsa_attention(*leaves, config=PAPER, **case.where("cuda"))
        return (o, *torch.autograd.grad(o.square().sum(), leaves))

    expected = run()
    for _ in range(30):
        for first, second in zip(expected, run(), strict=True):
            assert torch.equal(first, second)


def test_recomputing_gives_the_same_gradients():
    tensors = paper_inputs(3000)
    plain, again = (
        torch.autograd.grad(
            ops.nsa_attention(*tensors, config=PAPER, recompute=recompute).square().sum(), tensors
        )
        for recompute in (False, True)
    )
    for first, second in zip(plain, again, strict=True):
        assert torch.equal(first, second)


def test_what_lies_behind_the_last_block_is_never_used():
    """Caches have room for blocks to come, which holds anything."""
    tensors = [x.detach() for x in paper_inputs(2000)]
    expected = ops.nsa_attention(*tensors, config=PAPER)
    for i in range(1, 7):
        room = torch.full_like(tensors[i][:, :99], float("nan"))
        tensors[i] = torch.cat((tensors[i], room), dim=1)
    assert torch.equal(ops.nsa_attention(*tensors, config=PAPER), expected)


def test_works_inside_a_cuda_graph():
    tensors = [x.detach() for x in paper_inputs(3000)]

    def run():
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = ops.nsa_attention(*leaves, config=PAPER)
        return (o, *torch.autograd.grad(o.float().square().sum(), leaves))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x in tensors:
            x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, run(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of what inductor imports.
def test_compiles_to_one_graph():
    tensors = paper_inputs(2000)

    def run(*values):
        return ops.nsa_attention(*values, config=PAPER)

    def gradients(function):
        o = function(*tensors)
        return o, *torch.autograd.grad(o.float().square().sum(), tensors)

    compiled = torch.compile(run, fullgraph=True)
    for found, expected in zip(gradients(compiled), gradients(run), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_makes_no_host_synchronisation():
    tensors = paper_inputs(3000)
    packed = [x.detach()[0].requires_grad_() for x in tensors]
    cu_seqlens = torch.tensor([0, 1000, 1000, 3000], dtype=torch.int32, device="cuda")
    slots = 3000 // PAPER.compress_stride
    for i in (1, 2):
        packed[i] = torch.randn(slots, 1, 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
    for values, cu in ((tensors, None), (packed, cu_seqlens)):
        ops.nsa_attention(*values, config=PAPER, cu_seqlens=cu).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.nsa_attention(*values, config=PAPER, cu_seqlens=cu).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_where_the_tensors_are():
    expected, found = (
        ops.nsa_attention(*[x.to(device) for x in paper_inputs(300)], config=PAPER)
        for device in ("cuda:0", "cuda:1")
    )
    assert found.device.index == 1
    assert torch.equal(found.cpu(), expected.cpu())
