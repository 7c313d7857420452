"""What must hold for any geometry and any input, on thousands of generated cases.

Shapes are small, since the rules of the algorithm all show within a few blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import oracle
from tests.cases import (
    KINDS,
    NSA_INPUTS,
    Case,
    check_compress_kv,
    check_select_blocks,
    compare,
    compressor_weights,
    random_blocks,
)
from tests.tolerance import assert_close_to_oracle
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsa.config import NSAConfig
from nsa.ops import (
    CompressorWeights,
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
def cases(
    draw: st.DrawFn, *, packed: bool = False, min_length: int = 0, min_selected: int = 1
) -> Case:
    """A geometry that NSAConfig accepts, head counts, dims; one to three lengths if packed."""
    stride = draw(st.integers(1, 3))
    per_window = draw(st.integers(1, 3))
    init, local = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    config = NSAConfig(
        compress_block_size=stride * per_window,
        compress_stride=stride,
        block_size=stride * draw(st.integers(per_window, 4)),
        num_selected_blocks=max(min_selected, init + local + draw(st.integers(0, 2))),
        num_init_blocks=init,
        num_local_blocks=local,
        window_size=draw(st.integers(1, 9)),
    )
    lengths = st.lists(st.integers(min_length, 20), min_size=1, max_size=3 if packed else 1)
    return Case(
        name="",
        lengths=tuple(draw(lengths)),
        packed=packed,
        group=draw(st.sampled_from([1, 2, 3, 4, 8])),
        kv_heads=draw(st.integers(1, 2)),
        dk=draw(st.integers(1, 5)),
        dv=draw(st.integers(1, 5)),
        config=config,
        seed=draw(st.integers(0, 2**20)),
    )


PACKED = cases(packed=True)
SINGLE = cases()


def identity(
    num_cases: int, *drawn: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Makes a test of a check, which fails unless it ran ``num_cases`` generated cases.

    What is drawn leaves the check something to compare: a check never returns early.
    """

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        CASES_OF[check.__name__] = num_cases
        ran = 0

        def counted(values: tuple[Any, ...]) -> None:
            nonlocal ran
            check(*values)
            ran += 1

        run = settings(max_examples=num_cases)(given(st.tuples(*drawn))(counted))

        def test() -> None:
            run()
            assert ran >= num_cases, f"ran {ran} cases, not {num_cases}"

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def test_the_identities_generate_enough_cases():
    """Each test above all asserts that it ran its own share."""
    assert sum(CASES_OF.values()) >= MIN_CASES, CASES_OF


def _float32(case: Case) -> dict[str, Tensor]:
    return {name: x.float() for name, x in case.tensors().items()}


def _dense_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's own attention, ``[B, T, H, D]``."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    if q.shape[1] == 0:
        return v
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def _weights(case: Case, kind: str, side: str) -> CompressorWeights:
    made = compressor_weights(case, kind, side)
    return CompressorWeights(**{name[2:]: x.float() for name, x in made.items()})


def _check_dense(attend: Callable[..., Tensor], case: Case, branch: str) -> None:
    """Values and gradients of ``attend(q, k, v)`` are those of PyTorch's attention."""
    tensors = {name: case.tensors()[name] for name in ("q", f"k_{branch}", f"v_{branch}")}
    truth = functools.partial(_dense_causal, scale=case.scale())
    compare(attend, truth, tensors, dtype=torch.float32, seed=case.seed)


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


@identity(250, SINGLE)
def test_all_blocks_selected_is_dense_causal(case):
    enough = max(case.config.num_selected_blocks, case.config.num_blocks(case.lengths[0]))
    case = replace(case, config=replace(case.config, num_selected_blocks=enough))
    blocks = _choose(case, _float32(case), softmax_scale=case.scale())
    size = case.config.block_size
    attend = functools.partial(selected_attention, block_size=size, softmax_scale=case.scale())
    _check_dense(lambda q, k, v: attend(q, k, v, blocks), case, "slc")


@identity(200, SINGLE)
def test_a_window_as_long_as_the_sequence_is_dense_causal(case):
    enough = max(1, case.lengths[0] + case.config.window_size - 1)
    attend = functools.partial(window_attention, window_size=enough, softmax_scale=case.scale())
    _check_dense(attend, case, "win")


@identity(200, PACKED)
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


@identity(200, PACKED)
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


@identity(250, cases(min_length=1))
def test_a_decoding_step_is_a_row_of_prefill(case):
    t = case.seed % case.lengths[0]
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


@identity(300, cases(min_length=2), st.sampled_from(KINDS))
def test_a_token_changes_nothing_before_it(case, kind):
    """Through compression too: rows before the changed token are bit-identical."""
    t = 1 + case.seed % (case.lengths[0] - 1)
    phi = [_weights(case, kind, side) for side in "kv"]
    before = _float32(case)
    after = {name: x.clone() for name, x in before.items()}
    for name in ("q", "gates", "k_slc", "v_slc", "k_win", "v_win"):
        after[name][:, t:] += 10.0
    outputs = []
    for tensors in (before, after):
        tensors["k_cmp"], tensors["v_cmp"] = compress_kv(
            tensors["k_slc"],
            tensors["v_slc"],
            *phi,
            kind=kind,
            compress_block_size=case.config.compress_block_size,
            compress_stride=case.config.compress_stride,
        )
        outputs.append(_attend(case, tensors))
    assert torch.equal(outputs[0][:, :t], outputs[1][:, :t])


@identity(200, cases(packed=True, min_length=1, min_selected=2))
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


@identity(200, PACKED)
def test_the_choice_is_the_oracles(case):
    check_select_blocks(select_blocks, replace(case, dtype=torch.float64))


@identity(200, cases(min_length=1))
def test_the_choice_obeys_its_rules(case):
    """Ascending, -1 at the end, no future block, forced ones in, as many as there can be."""
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


@identity(150, PACKED)
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


@identity(100, PACKED, st.sampled_from(KINDS))
def test_every_phi_is_the_oracles(case, kind):
    """Values, gradients of the tokens and of all weights."""
    check_compress_kv(compress_kv, replace(case, dtype=torch.float32), kind)


@identity(60, PACKED)
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
