"""Ahead of time, without a GPU: kernels compile, keep what they hold in registers, and fit.

The table beside this file says what each kernel takes. Any difference fails: if it is meant, run
``python tests/kernels/resources.py`` and commit the table with the change that caused it.
"""

import json
import re

import pytest
import torch
import triton
from tests.kernels.machine_code import overwritten_operands
from tests.kernels.resources import (
    ASKED,
    COMPILED,
    MAX_SHARED,
    RECORDED,
    Launch,
    Resources,
    compile_launch,
    compiled,
    disassembly,
    kernels,
    recording,
    said_by_ptxas,
)
from triton import language as tl

from nsa.ops.launch import tuned

TABLE = json.loads(RECORDED.read_text(encoding="utf-8"))
KERNELS = {name: Resources(**row) for name, row in TABLE["kernels"].items()}
RENEW = "run python tests/kernels/resources.py and commit the table"
same_compiler = pytest.mark.skipif(
    triton.__version__ != TABLE["triton"],
    reason=f"recorded with Triton {TABLE['triton']}; another compiler, other registers",
)


def recorded(name: str) -> tuple[Launch, int]:
    """The launch of a row of the table, and what it is compiled for."""
    layer, target, kernel = name.split("/", 2)
    capability = int(target.removeprefix("sm_"))
    item = kernels(layer, capability).get(kernel)
    assert item is not None, f"no longer launched: {RENEW}"
    return item, capability


def test_the_table_has_every_kernel_that_is_launched():
    launched = {
        f"{layer}/sm_{capability}/{name}"
        for layer, capability in COMPILED
        for name in kernels(layer, capability)
    }
    assert launched == set(KERNELS), RENEW


def test_every_row_of_the_launch_tables_is_compiled():
    for layer, capability in COMPILED:
        kernels(layer, capability)
    asked = {(name, *widths) for capability, name, *widths in ASKED if capability == 90}
    for name, entries in tuned.table("sm90").items():
        for entry in entries:
            widths = (name, entry["key_dim"], entry["value_dim"])
            groups = {group for *found, group in asked if tuple(found) == widths}
            assert entry["group"] in groups, f"{name} {entry}: add its layer to resources.py"


@same_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_what_is_recorded(name):
    item, capability = recorded(name)
    found = compile_launch(item, capability)
    assert found == KERNELS[name], RENEW
    assert found.shared <= MAX_SHARED[capability]


@same_compiler
@pytest.mark.parametrize("name", [name for name in KERNELS if "/hopper_" in name])
def test_products_overlap(name):
    """ptxas serialises ``wgmma`` where it cannot follow an accumulator, and says so."""
    assert "serialized" not in said_by_ptxas(*recorded(name))


@pytest.mark.parametrize(
    "name", [name for name in KERNELS if re.search("/hopper_(attention_fwd|.*_dkv)_", name)]
)
def test_turns_have_barriers_of_their_own(name):
    """Triton numbers its barriers as it likes: one with a number of ours would never end."""
    ptx = compiled(*recorded(name)).asm["ptx"]
    named = re.findall(r"\bbar(?:rier)?\.(?:sync|arrive)\S*\s+([89])(?:, (\d+))?;", ptx)
    assert set(named) == {("8", "256"), ("9", "256")}


@pytest.mark.parametrize("name", [name for name in KERNELS if "/hopper_" in name])
def test_operands_stay_in_registers(name):
    """Once ptxas put queries of 64 columns and what ``dq`` multiplies next in the same ones."""
    assert not overwritten_operands(disassembly(*recorded(name)))


def test_an_overwritten_operand_is_seen():
    code = """
        /*0000*/ LDSM.16.M88.4 R8, [R2+UR4] ;
    .L_x_0:
        /*0010*/ HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0020*/ F2FP.BF16.F32.PACK_AB {spare}, R25, R24 ;
        /*0030*/ @P0 BRA `(.L_x_0) ;
        /*0040*/ EXIT ;
    """
    assert not overwritten_operands(code.format(spare="R12"))
    (product,) = overwritten_operands(code.format(spare="R11"))
    assert "R8, gdesc" in product


def test_nothing_spills():
    assert not [name for name, row in KERNELS.items() if row.stack or row.local]


def test_products_run_on_tensor_cores():
    products = ("attention_fwd", "block_scores", "dq", "dkv", "hidden", "weight_gradients")
    for name, row in KERNELS.items():
        kernel = name.rsplit("/", 1)[1].split(" ")[0].removesuffix("_kernel")
        if kernel.endswith(products):
            assert row.wgmma + row.mma > 0, name
        if "/sm_80/" in name:
            assert row.wgmma == 0, name


@triton.jit
def _greedy_kernel(x_ptr, COUNT: tl.constexpr):
    """Holds COUNT values a thread at once, so that they cannot all be in registers."""
    offsets = tl.arange(0, COUNT)
    values = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, values * tl.sum(values, 0))


def test_a_spill_is_seen():
    x = torch.empty(16384, dtype=torch.float32, device="meta")
    item = Launch(_greedy_kernel, {"x_ptr": x, "COUNT": 16384, "num_warps": 1})
    assert compile_launch(item, 90).stack > 0


def test_recording_starts_nothing():
    x = torch.empty(4, device="meta")
    launches = []
    with recording(launches):
        _greedy_kernel[(1,)](x_ptr=x, COUNT=4)
    assert [item.arguments for item in launches] == [{"x_ptr": x, "COUNT": 4}]
