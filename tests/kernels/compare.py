"""Launches every kernel on one small case and holds it against the float64 reference.

``TRITON_INTERPRET=1 python tests/kernels/compare.py CASE`` runs in Triton's interpreter, which has
to be chosen before the kernels are imported: hence a process of its own. Without the variable it
runs the compiled kernels on a GPU.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa import NSAConfig, reference
from nsa.ops import launch
from nsa.ops.launch.gradients import Branch, Geometry, attention_bwd

SMALL = NSAConfig(
    compress_block_size=8,
    compress_stride=4,
    block_size=16,
    num_selected_blocks=3,
    window_size=10,
)
SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison; packed when ``cu_seqlens`` is given."""

    heads: tuple[int, int]
    dims: tuple[int, int]
    seq: int
    batch: int = 1
    cu_seqlens: tuple[int, ...] | None = None
    config: NSAConfig = SMALL


CASES = {
    "gqa2-odd-batch": Case(heads=(4, 2), dims=(16, 16), seq=75, batch=2),
    "one-token": Case(heads=(2, 1), dims=(16, 32), seq=1, batch=2),
    "group3-below-a-block": Case(heads=(3, 1), dims=(24, 16), seq=7),
    "packed-with-empty-and-single": Case(
        heads=(2, 2), dims=(16, 16), seq=70, cu_seqlens=(0, 0, 1, 40, 41, 70)
    ),
}


def compare(case: Case) -> None:
    """Raises AssertionError where a kernel is off."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = "cpu" if interpreted else "cuda"
    torch.manual_seed(0)
    (num_heads, num_kv_heads), (key_dim, value_dim) = case.heads, case.dims
    lead = (case.seq,) if case.cu_seqlens else (case.batch, case.seq)
    cu = torch.tensor(case.cu_seqlens, dtype=torch.int32) if case.cu_seqlens else None

    def draw(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape).double()

    q = draw(num_heads, key_dim)
    k_raw, k_slc, k_win = (draw(num_kv_heads, key_dim) for _ in range(3))
    v_raw, v_slc, v_win = (draw(num_kv_heads, value_dim) for _ in range(3))
    gates, do = draw(num_heads, 3).sigmoid(), draw(num_heads, value_dim)
    compress = {
        "compress_block_size": case.config.compress_block_size,
        "compress_stride": case.config.compress_stride,
    }
    k_cmp, v_cmp = (
        reference.compress_fwd(x, None, None, None, cu_seqlens=cu, kind="mean", **compress)
        for x in (k_raw, v_raw)
    )
    fp32 = [x.float().to(device) for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, do)]
    forward = _forward(fp32, case.config, compress, None if cu is None else cu.to(device))
    indices = forward["block_indices"].cpu()
    oracle = _oracle(
        (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, do), indices, case.config, compress, cu
    )
    assert torch.equal(indices, oracle.pop("block_indices")), "block_indices differ"
    for name, expected in oracle.items():
        torch.testing.assert_close(
            forward[name].cpu().double(),
            expected,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, n=name: n + m,
        )


def _forward(
    tensors: list[Tensor], config: NSAConfig, compress: dict[str, int], cu: Tensor | None
) -> dict[str, Tensor]:
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, do = tensors
    small = {"BM": 32, "BN": 32}
    common = {"cu_seqlens": cu, "softmax_scale": SCALE}
    o_cmp, lse = launch.compressed_attention_fwd(q, k_cmp, v_cmp, **compress, **common, **small)
    indices = launch.select_blocks(q, k_cmp, lse, config=config, **common, **small)
    out = launch.selected_window_fwd(
        q,
        (k_slc, v_slc, indices),
        (k_win, v_win),
        gates,
        o_cmp,
        block_size=config.block_size,
        window_size=config.window_size,
        **common,
        **small,
    )
    branches = {
        "cmp": Branch(k=k_cmp, v=v_cmp, o=o_cmp, lse=lse),
        "slc": Branch(k=k_slc, v=v_slc, o=out["o_slc"], lse=out["lse_slc"], block_indices=indices),
        "win": Branch(k=k_win, v=v_win, o=out["o_win"], lse=out["lse_win"]),
    }
    geometry = Geometry(
        **compress, block_size=config.block_size, window_size=config.window_size, **common
    )
    grads = attention_bwd(do, q, branches, gates, geometry, dq_tile=(32, 32, 4, 2))
    return {"o_cmp": o_cmp, "lse_cmp": lse, "block_indices": indices, **out, **grads}


def _oracle(
    tensors: tuple[Tensor, ...],
    indices: Tensor,
    config: NSAConfig,
    compress: dict[str, int],
    cu: Tensor | None,
) -> dict[str, Tensor]:
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, do = tensors
    common = {"cu_seqlens": cu, "softmax_scale": SCALE}
    o_cmp, lse = reference.compressed_attention_fwd(q, k_cmp, v_cmp, **compress, **common)
    chosen = reference.select_blocks(q, k_cmp, lse, config=config, **common)
    slc = {"block_size": config.block_size, **common}
    win = {"window_size": config.window_size, **common}
    o_slc, lse_slc = reference.selected_attention_fwd(q, k_slc, v_slc, indices, **slc)
    o_win, lse_win = reference.window_attention_fwd(q, k_win, v_win, **win)
    d_cmp, d_slc, d_win = (do * gate.unsqueeze(-1) for gate in gates.unbind(-1))
    grads = (
        reference.compressed_attention_bwd(
            d_cmp, None, q, k_cmp, v_cmp, o_cmp, lse, **compress, **common
        ),
        reference.selected_attention_bwd(
            d_slc, None, q, k_slc, v_slc, indices, o_slc, lse_slc, **slc
        ),
        reference.window_attention_bwd(d_win, None, q, k_win, v_win, o_win, lse_win, **win),
    )
    result = {
        "block_indices": chosen,
        "o_cmp": o_cmp,
        "lse_cmp": lse,
        "o_slc": o_slc,
        "lse_slc": lse_slc,
        "o_win": o_win,
        "lse_win": lse_win,
        "o": reference.combine(o_cmp, o_slc, o_win, gates),
        "dq": sum(grad[0] for grad in grads),
        "dgates": torch.stack([(do * o).sum(-1) for o in (o_cmp, o_slc, o_win)], -1),
    }
    for name, grad in zip(("cmp", "slc", "win"), grads, strict=True):
        result[f"dk_{name}"], result[f"dv_{name}"] = grad[1], grad[2]
    return result


if __name__ == "__main__":
    compare(CASES[sys.argv[1]])
