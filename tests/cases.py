"""Cases and checks of the operations: inputs, the oracle's answer, and the comparison.

A check takes the operation as an argument, so the same check serves the reference, the public ops
on any device, and wrong versions that it must reject. It compares outputs and all gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tests import oracle
from tests.comparison import compare
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops import CompressorWeights

SMALL = NSAConfig(
    compress_block_size=4,
    compress_stride=2,
    block_size=8,
    num_selected_blocks=3,
    num_local_blocks=1,
    window_size=5,
)
# The stride is the block: compressed blocks do not overlap.
DISJOINT = replace(SMALL, compress_stride=4)
# l = l', three pieces per compressed block, two local blocks, no initial one.
WIDE = NSAConfig(
    compress_block_size=6,
    compress_stride=2,
    block_size=6,
    num_selected_blocks=4,
    num_init_blocks=0,
    num_local_blocks=2,
    window_size=1,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of one test. ``lengths`` are a packed tensor's, or of a batch, all equal.

    ``spare`` keys of a batch's selected branch and of its window lie behind the last query.
    """

    name: str
    lengths: tuple[int, ...]
    packed: bool = False
    offset: int = 0
    spare: tuple[int, int] = (0, 0)
    group: int = 2
    kv_heads: int = 2
    dk: int = 4
    dv: int = 4
    config: NSAConfig = SMALL
    dtype: torch.dtype = torch.float32
    spread: float = 1.0
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Float64 inputs of every operation, exactly representable in ``dtype``."""
        generator = torch.Generator().manual_seed(self.seed)
        length = self.lengths[0]
        if self.packed:
            rows = slc = win = (sum(self.lengths),)
            blocks = (sum(self.lengths) // self.config.compress_stride,)
        else:
            batch, total = len(self.lengths), self.offset + length
            rows = (batch, length)
            slc, win = ((batch, total + more) for more in self.spare)
            blocks = (batch, self.config.num_compressed(total))
        heads = self.kv_heads * self.group
        shapes = {"q": (*rows, heads, self.dk)}
        for branch, count in (("cmp", blocks), ("slc", slc), ("win", win)):
            shapes[f"k_{branch}"] = (*count, self.kv_heads, self.dk)
            shapes[f"v_{branch}"] = (*count, self.kv_heads, self.dv)
        shapes["gates"] = (*rows, heads, 3)
        tensors = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        tensors["q"] *= self.spread
        return {name: x.to(self.dtype).double() for name, x in tensors.items()}

    def cu_seqlens(self) -> Tensor | None:
        """int32 ``[num_seqs + 1]`` of a packed case, every second entry of a tensor."""
        if not self.packed:
            return None
        return torch.tensor([0, *self.lengths]).cumsum(0).int().repeat_interleave(2)[::2]

    def scale(self) -> float:
        """A softmax scale other than the default."""
        return 0.7

    def per_sequence(
        self, function: Callable, *tensors: Tensor, slots: tuple[int, ...] = (), into_slots=False
    ):
        """The oracle's ``function``, which takes one sequence, on every sequence of the case."""
        if not self.packed:
            return oracle.batched(function, *tensors)
        return oracle.packed(
            function,
            *tensors,
            lengths=self.lengths,
            slots=slots,
            config=self.config,
            into_slots=into_slots,
        )

    def where(self, device: str = "cpu") -> dict[str, object]:
        """Keyword arguments that every attention operation takes."""
        cu_seqlens = self.cu_seqlens()
        return {
            "softmax_scale": self.scale(),
            "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(device),
            "q_offset": self.offset,
        }


LENGTHS = [
    Case(name="empty", lengths=(0,)),
    Case(name="one-token", lengths=(1,)),
    Case(name="shorter-than-a-block", lengths=(3, 3)),
    Case(name="one-block", lengths=(4,)),
    Case(name="block-and-one", lengths=(5,)),
    Case(name="selection-block-less-one", lengths=(7,)),
    Case(name="multiple", lengths=(32,)),
    Case(name="odd-batch", lengths=(37, 37, 37)),
]
GROUPS = [
    Case(name=f"group-{group}", lengths=(19,), group=group, kv_heads=kv_heads)
    for group, kv_heads in ((1, 3), (2, 1), (3, 2), (4, 2), (8, 1), (16, 2))
]
SHAPES = [
    Case(name="wide-values", lengths=(21,), dk=3, dv=7),
    Case(name="wide-keys", lengths=(21,), dk=9, dv=2),
    Case(name="disjoint-blocks", lengths=(29,), config=DISJOINT),
    Case(name="equal-block-sizes", lengths=(29,), config=WIDE),
    Case(name="offset", lengths=(5, 5), offset=23),
    Case(name="offset-one-query", lengths=(1, 1), offset=40),
    Case(name="offset-below-a-block", lengths=(2,), offset=1),
    Case(name="spare-keys", lengths=(17, 17), offset=4, spare=(9, 2)),
    Case(name="endless-window", lengths=(21,), config=replace(SMALL, window_size=2**31 - 1)),
]
PACKED = [
    Case(name="packed", lengths=(0, 1, 13, 0, 21, 3, 4), packed=True),
    Case(name="packed-one", lengths=(18,), packed=True, dk=5, dv=3),
    Case(name="packed-all-empty", lengths=(0, 0), packed=True),
    Case(name="packed-tokens", lengths=(1, 1, 1), packed=True),
    Case(name="packed-equal-block-sizes", lengths=(7, 11, 6), packed=True, config=WIDE, group=3),
]
DTYPES = [
    Case(name="float64", lengths=(23,), dtype=torch.float64),
    Case(name="float16", lengths=(23,), dtype=torch.float16),
    Case(name="bfloat16", lengths=(23,), dtype=torch.bfloat16),
    Case(name="bfloat16-packed", lengths=(9, 0, 14), packed=True, dtype=torch.bfloat16),
]
# Logits of about +-1e4, so one key takes everything and a careless exp overflows.
HUGE = [
    Case(name="logits-1e4", lengths=(23,), spread=1e4),
    Case(name="logits-1e4-packed", lengths=(9, 14), packed=True, spread=1e4),
    Case(name="logits-1e4-float16", lengths=(23,), spread=3e3, dtype=torch.float16),
]
CASES = LENGTHS + GROUPS + SHAPES + PACKED + DTYPES + HUGE
FEW = [
    case for case in CASES if case.name in ("empty", "odd-batch", "offset", "packed", "bfloat16")
]


def _pick(case: Case, *names: str) -> dict[str, Tensor]:
    tensors = case.tensors()
    return {name: tensors[name] for name in names}


def check_compressed_attention(op: Callable, case: Case, device: str = "cpu") -> None:
    """``o``, ``lse`` and their gradients."""

    def truth(*tensors: Tensor):
        def one(q, k, v):
            return oracle.compressed_attention(
                q, k, v, config=case.config, scale=case.scale(), offset=case.offset
            )

        return case.per_sequence(one, *tensors, slots=(1, 2))

    def tested(*tensors: Tensor):
        return op(
            *tensors,
            compress_block_size=case.config.compress_block_size,
            compress_stride=case.config.compress_stride,
            **case.where(device),
        )

    tensors = _pick(case, "q", "k_cmp", "v_cmp")
    found = compare(tested, truth, tensors, dtype=case.dtype, seed=case.seed, device=device)
    assert found["out1"].dtype == torch.promote_types(case.dtype, torch.float32)


def check_window_attention(op: Callable, case: Case, device: str = "cpu") -> None:
    """``o`` and its gradients."""

    def truth(*tensors: Tensor):
        def one(q, k, v):
            return oracle.window_attention(
                q,
                k,
                v,
                window_size=case.config.window_size,
                scale=case.scale(),
                offset=case.offset,
            )

        return case.per_sequence(one, *tensors)

    def tested(*tensors: Tensor):
        return op(*tensors, window_size=case.config.window_size, **case.where(device))

    tensors = _pick(case, "q", "k_win", "v_win")
    compare(tested, truth, tensors, dtype=case.dtype, seed=case.seed, device=device)


def random_blocks(case: Case) -> Tensor:
    """Blocks no rule would choose: any number of candidates in any order, unused slots among them.

    Some are there twice, and some hold no key of the sequence.
    """
    generator = torch.Generator().manual_seed(case.seed + 2)

    def one(q: Tensor) -> Tensor:
        n = case.config.num_selected_blocks
        chosen = torch.full((q.shape[0], case.kv_heads, n), -1, dtype=torch.int32)
        for t in range(q.shape[0]):
            candidates = (case.offset + t) // case.config.block_size + 1
            for head in range(case.kv_heads):
                count = int(torch.randint(min(n, candidates) + 1, (), generator=generator))
                picked = torch.randperm(candidates, generator=generator)[:count]
                chosen[t, head, :count] = picked.int()
                if count and count < n and (t + head) % 2:
                    chosen[t, head, count] = (int(picked[0]), 2**20)[t % 4 // 2]
                chosen[t, head] = chosen[t, head, torch.randperm(n, generator=generator)]
        return chosen

    return case.per_sequence(one, case.tensors()["q"])


def check_selected_attention(op: Callable, case: Case, device: str = "cpu") -> None:
    """``o`` and its gradients, given arbitrary blocks."""
    blocks = random_blocks(case)

    def truth(*tensors: Tensor):
        def one(q, k, v, block_indices):
            return oracle.selected_attention(
                q,
                k,
                v,
                block_indices,
                block_size=case.config.block_size,
                scale=case.scale(),
                offset=case.offset,
            )

        return case.per_sequence(one, *tensors, blocks)

    def tested(*tensors: Tensor):
        return op(
            *tensors,
            blocks.to(device),
            block_size=case.config.block_size,
            **case.where(device),
        )

    tensors = _pick(case, "q", "k_slc", "v_slc")
    compare(tested, truth, tensors, dtype=case.dtype, seed=case.seed, device=device)


def oracle_blocks(case: Case) -> Tensor:
    """The oracle's choice, from float64 inputs."""

    def one(q, k_cmp):
        return oracle.select_blocks(
            q, k_cmp, config=case.config, scale=case.scale(), offset=case.offset
        )

    tensors = case.tensors()
    return case.per_sequence(one, tensors["q"], tensors["k_cmp"], slots=(1,))


def check_select_blocks(op: Callable, case: Case, device: str = "cpu", exact=True) -> Tensor:
    """The oracle's choice exactly, which random scores allow: other ties are exact.

    Unless ``exact``, near-ties may be decided either way, so the chosen blocks' scores are compared
    instead. Returns the choice.
    """
    tensors = {name: x.to(case.dtype) for name, x in case.tensors().items()}

    def one(q, k, v):
        return oracle.compressed_attention(
            q, k, v, config=case.config, scale=case.scale(), offset=case.offset
        )

    inputs = case.tensors()
    _, lse = case.per_sequence(one, inputs["q"], inputs["k_cmp"], inputs["v_cmp"], slots=(1, 2))
    found = op(
        tensors["q"].to(device),
        tensors["k_cmp"].to(device),
        lse.to(device, torch.promote_types(case.dtype, torch.float32)),
        config=case.config,
        **case.where(device),
    )
    expected, found = oracle_blocks(case), found.cpu()
    assert found.dtype == torch.int32
    if not exact:
        check_near_ties(case, found, expected)
        return found
    assert torch.equal(found, expected), f"chose {found.tolist()}, not {expected.tolist()}"
    return found


def check_near_ties(case: Case, found: Tensor, expected: Tensor) -> None:
    """A valid list whose oracle scores are those of the best blocks, within float32 rounding."""

    def scores(blocks: Tensor) -> Tensor:
        def one(q: Tensor, k_cmp: Tensor, chosen: Tensor) -> Tensor:
            table = oracle.block_scores(
                q, k_cmp, config=case.config, scale=case.scale(), offset=case.offset
            )
            out = torch.full(chosen.shape, -1.0, dtype=torch.float64)
            for t, head, slot in (chosen >= 0).nonzero().tolist():
                out[t, head, slot] = table[t][head][chosen[t, head, slot]]
            return out.sort(-1).values

        return case.per_sequence(one, tensors["q"], tensors["k_cmp"], blocks, slots=(1,))

    tensors = case.tensors()
    order = torch.where(found < 0, torch.iinfo(torch.int32).max, found)
    used = found >= 0
    assert torch.equal(used, expected >= 0), "another number of blocks"
    assert ((order[..., 1:] > order[..., :-1]) | ~used[..., 1:]).all(), "not ascending"
    logit = case.scale() * case.dk * _largest(tensors["q"]) * _largest(tensors["k_cmp"])
    bound = 8 * case.group * torch.finfo(torch.float32).eps * (4 + logit)
    torch.testing.assert_close(scores(found), scores(expected), rtol=0, atol=bound)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


NSA_INPUTS = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")


def check_nsa_attention(
    op: Callable, case: Case, device: str = "cpu", blocks: Tensor | None = None
) -> None:
    """The gated sum and gradients of all eight inputs, none of them through the choice.

    ``blocks`` are those that ``op`` chooses; the oracle's if None.
    """
    blocks = oracle_blocks(case) if blocks is None else blocks

    def truth(*tensors: Tensor):
        def one(*pieces):
            return oracle.nsa_attention(
                *pieces, config=case.config, scale=case.scale(), offset=case.offset
            )

        return case.per_sequence(one, *tensors, blocks, slots=(1, 2))

    def tested(*tensors: Tensor):
        return op(*tensors, config=case.config, **case.where(device))

    tensors = _pick(case, *NSA_INPUTS)
    compare(tested, truth, tensors, dtype=case.dtype, seed=case.seed, device=device)


KINDS = ("mlp", "linear", "gated", "mean")


def compressor_weights(case: Case, kind: str, side: str) -> dict[str, Tensor]:
    """Random float64 weights that one phi of this kind needs, named ``<side>_pe`` and so on."""
    generator = torch.Generator().manual_seed(case.seed + (3 if side == "k" else 4))
    dim, size = (case.dk if side == "k" else case.dv), case.config.compress_block_size
    hidden = dim + 2
    shapes = {
        "mlp": {
            "pe": (case.kv_heads, size, dim),
            "w1": (hidden, size * dim),
            "w2": (dim, hidden),
        },
        "linear": {"pe": (case.kv_heads, size, dim), "w1": (dim, size * dim)},
        "gated": {"pe": (case.kv_heads, size, dim), "w1": (dim, dim)},
        "mean": {},
    }[kind]
    return {
        f"{side}_{name}": (torch.randn(shape, generator=generator, dtype=torch.float64) / 2)
        .to(case.dtype)
        .double()
        for name, shape in shapes.items()
    }


def check_compress_kv(op: Callable, case: Case, kind: str, device: str = "cpu") -> None:
    """Compressed keys and values, gradients of the tokens and of every weight."""
    weights = compressor_weights(case, kind, "k") | compressor_weights(case, kind, "v")
    tensors = _pick(case, "k_slc", "v_slc") | weights
    names = list(tensors)

    def phi(given: dict[str, Tensor], side: str) -> CompressorWeights:
        return CompressorWeights(*[given.get(f"{side}_{part}") for part in ("pe", "w1", "w2")])

    def truth(*values: Tensor):
        given = dict(zip(names, values, strict=True))

        def one(side):
            return lambda x: oracle.compress(
                x,
                *phi(given, side),
                kind=kind,
                size=case.config.compress_block_size,
                stride=case.config.compress_stride,
            )

        return tuple(
            case.per_sequence(one(side), given[f"{side}_slc"], into_slots=True) for side in "kv"
        )

    def tested(*values: Tensor):
        given = dict(zip(names, values, strict=True))
        return op(
            given["k_slc"],
            given["v_slc"],
            phi(given, "k"),
            phi(given, "v"),
            kind=kind,
            compress_block_size=case.config.compress_block_size,
            compress_stride=case.config.compress_stride,
            cu_seqlens=case.where(device)["cu_seqlens"],
        )

    compare(tested, truth, tensors, dtype=case.dtype, seed=case.seed, device=device)
