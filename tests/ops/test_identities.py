"""What must hold for any geometry and any input, on thousands of generated cases.

Shapes are small, since the rules of the algorithm all show within a few blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import oracle
from tests.cases import NSA_INPUTS, Case, check_select_blocks, compare, random_blocks
from tests.tolerance import assert_close_to_oracle
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsa.config import NSAConfig
from nsa.ops import (
    compress_kv,
    compressed_attention,
    nsa_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
    window_attention,
)

MIN_CASES = 2000
CASES_OF: dict[str, int] = {}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A geometry that NSAConfig accepts, head counts, dims, one to three lengths."""
    stride = draw(st.integers(1, 3))
    per_window = draw(st.integers(1, 3))
    init, local = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    config = NSAConfig(
        compress_block_size=stride * per_window,
        compress_stride=stride,
        block_size=stride * draw(st.integers(per_window, 4)),
        num_selected_blocks=max(1, init + local + draw(st.integers(0, 2))),
        num_init_blocks=init,
        num_local_blocks=local,
        window_size=draw(st.integers(1, 9)),
    )
    return Case(
        name="",
        lengths=tuple(draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))),
        packed=True,
        group=draw(st.sampled_from([1, 2, 3, 4, 8])),
        kv_heads=draw(st.integers(1, 2)),
        dk=draw(st.integers(1, 5)),
        dv=draw(st.integers(1, 5)),
        config=config,
        seed=draw(st.integers(0, 2**20)),
    )


def identity(num_cases: int) -> Callable[[Callable[[Case], None]], Callable[[], None]]:
    """Makes a test of a check, which fails unless it ran ``num_cases`` generated cases."""

    def decorate(check: Callable[[Case], None]) -> Callable[[], None]:
        CASES_OF[check.__name__] = num_cases
        ran = 0

        @functools.wraps(check)
        def counted(case: Case) -> None:
            nonlocal ran
            check(case)
            ran += 1

        run = settings(max_examples=num_cases)(given(cases())(counted))

        def test() -> None:
            run()
            assert ran >= num_cases, f"ran {ran} cases, not {num_cases}"

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def test_the_identities_generate_enough_cases():
    """Each test above all asserts that it ran its own share."""
    assert sum(CASES_OF.values()) >= MIN_CASES, CASES_OF


def _single(case: Case) -> Case:
    """The first sequence of the case, as a batch of one."""
    return replace(case, lengths=case.lengths[:1], packed=False)


def _float32(case: Case) -> dict[str, Tensor]:
    return {name: x.float() for name, x in case.tensors().items()}


def _dense_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's own attention, ``[B, T, H, D]``."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    if q.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def _assert_dense(out: Tensor, case: Case, branch: str) -> None:
    names = ("q", f"k_{branch}", f"v_{branch}")
    wide, narrow = case.tensors(), _float32(case)
    assert_close_to_oracle(
        out,
        _dense_causal(*[wide[name] for name in names], case.scale()),
        _dense_causal(*[narrow[name] for name in names], case.scale()),
    )


def _choose(case: Case, tensors: dict[str, Tensor], **options) -> Tensor:
    q, k_cmp, v_cmp = (tensors[name] for name in ("q", "k_cmp", "v_cmp"))
    _, lse = compressed_attention(
        q,
        k_cmp,
        v_cmp,
        compress_block_size=case.config.compress_block_size,
        compress_stride=case.config.compress_stride,
        **options,
    )
    return select_blocks(q, k_cmp, lse, config=case.config, **options)


def _attend(case: Case, tensors: dict[str, Tensor], **options) -> Tensor:
    return nsa_attention(
        *[tensors[name] for name in NSA_INPUTS], config=case.config, **(case.where() | options)
    )


@identity(250)
def test_all_blocks_selected_is_dense_causal(case):
    case = _single(case)
    length = case.lengths[0]
    enough = max(case.config.num_selected_blocks, case.config.num_blocks(length))
    case = replace(case, config=replace(case.config, num_selected_blocks=enough))
    tensors = _float32(case)
    blocks = _choose(case, tensors, softmax_scale=case.scale())
    out = selected_attention(
        *[tensors[name] for name in ("q", "k_slc", "v_slc")],
        blocks,
        block_size=case.config.block_size,
        softmax_scale=case.scale(),
    )
    _assert_dense(out, case, "slc")


@identity(200)
def test_a_window_as_long_as_the_sequence_is_dense_causal(case):
    case = _single(case)
    tensors = _float32(case)
    out = window_attention(
        *[tensors[name] for name in ("q", "k_win", "v_win")],
        window_size=max(1, case.lengths[0] + case.config.window_size - 1),
        softmax_scale=case.scale(),
    )
    _assert_dense(out, case, "win")


@identity(200)
def test_a_one_hot_gate_is_that_branch(case):
    tensors, where = _float32(case), case.where()
    q = tensors["q"]
    o_cmp, _ = compressed_attention(
        q,
        tensors["k_cmp"],
        tensors["v_cmp"],
        compress_block_size=case.config.compress_block_size,
        compress_stride=case.config.compress_stride,
        **where,
    )
    o_slc = selected_attention(
        q,
        tensors["k_slc"],
        tensors["v_slc"],
        _choose(case, tensors, **where),
        block_size=case.config.block_size,
        **where,
    )
    o_win = window_attention(
        q, tensors["k_win"], tensors["v_win"], window_size=case.config.window_size, **where
    )
    for c, branch in enumerate((o_cmp, o_slc, o_win)):
        tensors["gates"] = torch.zeros_like(tensors["gates"])
        tensors["gates"][..., c] = 1.0
        assert torch.equal(_attend(case, tensors), branch), f"branch {c}"


@identity(200)
def test_packed_sequences_are_separate_sequences(case):
    """Values and all gradients."""

    def packed(*values: Tensor) -> Tensor:
        return nsa_attention(*values, config=case.config, **case.where())

    def separate(*values: Tensor) -> Tensor:
        outputs, start = [], 0
        for length in case.lengths:
            slot = start // case.config.compress_stride
            cuts = [slice(start, start + length)] * len(NSA_INPUTS)
            cuts[1] = cuts[2] = slice(slot, slot + case.config.num_compressed(length))
            alone = [x[cut][None] for x, cut in zip(values, cuts, strict=True)]
            outputs.append(nsa_attention(*alone, config=case.config, softmax_scale=case.scale())[0])
            start += length
        return torch.cat(outputs)

    compare(separate, packed, case.tensors(), dtype=torch.float32, seed=case.seed)


@identity(250)
def test_a_decoding_step_is_a_row_of_prefill(case):
    case = _single(case)
    length = case.lengths[0]
    if length == 0:
        return
    t = case.seed % length
    narrow = _float32(case)

    def one_row(tensors: dict[str, Tensor]) -> list[Tensor]:
        rows = {name: tensors[name][:, t : t + 1] for name in ("q", "gates")}
        return [(tensors | rows)[name] for name in NSA_INPUTS]

    truth, same = _attend(case, case.tensors()), _attend(case, narrow)
    options = {"config": case.config, "softmax_scale": case.scale()}
    decoded = nsa_decode(*one_row(narrow), seq_lens=torch.tensor([t + 1]), **options)
    offset = nsa_attention(*one_row(narrow), q_offset=t, **options)
    for out in (decoded, offset):
        # The bound is that of all rows: one row alone may be exact by luck.
        rows = same.clone()
        rows[:, t : t + 1] = out
        assert_close_to_oracle(rows, truth, same)


@identity(300)
def test_a_token_changes_nothing_before_it(case):
    """Through compression too: rows before the changed token are bit-identical."""
    case = _single(case)
    length = case.lengths[0]
    if length == 0:
        return
    t = case.seed % length
    before = _float32(case)
    after = {name: x.clone() for name, x in before.items()}
    for name in ("q", "gates", "k_slc", "v_slc", "k_win", "v_win"):
        after[name][:, t:] += 10.0
    outputs = []
    for tensors in (before, after):
        tensors["k_cmp"], tensors["v_cmp"] = compress_kv(
            tensors["k_slc"],
            tensors["v_slc"],
            kind="mean",
            compress_block_size=case.config.compress_block_size,
            compress_stride=case.config.compress_stride,
        )
        outputs.append(_attend(case, tensors))
    assert torch.equal(outputs[0][:, :t], outputs[1][:, :t])


@identity(200)
def test_the_order_of_a_block_list_does_not_matter(case):
    tensors, blocks = _float32(case), random_blocks(case)
    generator = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(blocks.shape[-1], generator=generator)

    def attend(block_indices: Tensor) -> Tensor:
        return selected_attention(
            *[tensors[name] for name in ("q", "k_slc", "v_slc")],
            block_indices,
            block_size=case.config.block_size,
            **case.where(),
        )

    assert torch.equal(attend(blocks[..., order].contiguous()), attend(blocks))


@identity(200)
def test_the_choice_is_the_oracles(case):
    check_select_blocks(select_blocks, replace(case, dtype=torch.float64))


@identity(200)
def test_the_choice_obeys_its_rules(case):
    """Ascending, -1 at the end, no future block, forced ones in, as many as there can be."""
    case = _single(case)
    blocks = _choose(case, _float32(case), softmax_scale=case.scale())
    config = case.config
    for t, heads in enumerate(blocks[0].tolist()):
        own = t // config.block_size
        forced = {j for j in range(own + 1) if j < config.num_init_blocks}
        forced |= {j for j in range(own + 1) if own - j < config.num_local_blocks}
        for row in heads:
            used = [j for j in row if j >= 0]
            assert row == used + [-1] * (config.num_selected_blocks - len(used))
            assert used == sorted(set(used))
            assert len(used) == min(config.num_selected_blocks, own + 1)
            assert forced <= set(used) <= set(range(own + 1))


@identity(150)
def test_equal_values_come_out_unchanged(case):
    """Weights sum to 1 wherever anything is visible, to 0 elsewhere."""
    tensors, where = _float32(case), case.where()
    ones = {name: torch.ones_like(tensors[name]) for name in ("v_cmp", "v_win")}
    o_win = window_attention(tensors["q"], tensors["k_win"], ones["v_win"], window_size=3, **where)
    torch.testing.assert_close(o_win, torch.ones_like(o_win), rtol=1e-6, atol=0)
    o_cmp, lse = compressed_attention(
        tensors["q"],
        tensors["k_cmp"],
        ones["v_cmp"],
        compress_block_size=case.config.compress_block_size,
        compress_stride=case.config.compress_stride,
        **where,
    )
    expected = lse.isfinite().float().unsqueeze(-1).expand_as(o_cmp)
    torch.testing.assert_close(o_cmp, expected, rtol=1e-6, atol=0)


@identity(60)
def test_the_whole_is_the_oracles(case):
    wide = case.tensors()
    blocks = _choose(case, wide, **case.where())

    def one(*pieces):
        return oracle.nsa_attention(*pieces, config=case.config, scale=case.scale())

    truth, same = (
        case.per_sequence(one, *[given[n] for n in NSA_INPUTS], blocks, slots=(1, 2))
        for given in (wide, _float32(case))
    )
    assert_close_to_oracle(_attend(case, _float32(case)), truth, same)
