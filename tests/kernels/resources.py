"""What every kernel costs on a GPU that need not be here: compiles launches ahead of time.

``python tests/kernels/resources.py`` writes ``resources.json`` anew. Review its change like code:
more registers mean fewer programs on a multiprocessor, a stack means spilled registers.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from nsa import NSAConfig
from nsa.ops import launch
from nsa.ops.launch import hopper_forward, tuned
from nsa.ops.launch.compress_kv import compress_bwd, compress_fwd

RECORDED = Path(__file__).with_name("resources.json")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CUOBJDUMP, NVDISASM, PTXAS = (BINARIES / name for name in ("cuobjdump", "nvdisasm", "ptxas"))
# Shared memory that one program may take, in bytes.
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024}
# Tensor core instructions: of Hopper's warp groups, and of a warp, which reach half the rate there.
WGMMA = re.compile(r"\bwgmma\.mma_async\b")
MMA = re.compile(r"\bmma\.sync\b")
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Sizes of an attention layer whose launches are compiled."""

    heads: tuple[int, int]
    dims: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    seq_len: int = 65536
    packed: bool = False
    max_seqlen: int | None = None
    config: NSAConfig = field(default_factory=NSAConfig.paper)


# By group and width, layers that run the kernels of all GPUs on Hopper too: at widths of 96 and 256
# in any group, elsewhere in small ones, whose tiles hold many tokens.
GROUPED = {
    **{
        f"group{group}-d{dim}": Layer(heads=(2 * group, 2), dims=(dim, dim))
        for dim in (96, 256)
        for group in (8, 12, 24, 48)
    },
    **{
        f"group{group}-d{key_dim}": Layer(heads=(32, 32 // group), dims=(key_dim, value_dim))
        for key_dim, value_dim in ((64, 64), (128, 128), (192, 128), (256, 256))
        for group in (1, 2, 4)
    },
}
# The paper's shape; it at the width that dense kernels support, also with so few tokens that all
# blocks are selected, and with many such sequences packed; packed, first a layer of
# configs/100m-16k.yaml; with groups so large that a step has a part of the heads of a token; a
# single row, since Triton makes a constant of an integer argument of 1; groups that tiles pad; and
# those above.
LAYERS = {
    "paper-d128": Layer(heads=(64, 4), dims=(128, 128)),
    "short-d128": Layer(heads=(64, 4), dims=(128, 128), seq_len=1024),
    "short-packed": Layer(heads=(16, 1), dims=(64, 64), packed=True, max_seqlen=1024),
    "paper": Layer(heads=(64, 4), dims=(192, 128)),
    "group16-d64-packed": Layer(heads=(16, 1), dims=(64, 64), seq_len=16384, packed=True),
    "group1-d64-packed": Layer(heads=(8, 8), dims=(64, 64), packed=True),
    "group64-d128": Layer(heads=(64, 1), dims=(128, 128)),
    "one-row": Layer(heads=(1, 1), dims=(64, 64), seq_len=1),
    "group7-d128": Layer(heads=(28, 4), dims=(128, 128)),
    "group24-d128": Layer(heads=(24, 1), dims=(128, 128)),
    "group48-d64-packed": Layer(heads=(48, 1), dims=(64, 64), packed=True),
    **GROUPED,
}
TRAINING = ("compress", "compress-backward", "forward", "backward")
ALONE = (
    "mean",
    "mean-backward",
    "inference",
    "selected",
    "window",
    "compressed-backward",
    "selected-backward",
    "window-backward",
)
# Layers of which only the kernels in the launch table are compiled: others do not differ much from
# layer to layer, and each takes seconds.
TILES_ONLY = {"group1-d64", "group4-d64"}
TILES_ONLY |= {name for name in GROUPED if name.endswith(("-d96", "-d256"))}
# For each layer and architecture, the steps that are compiled.
COMPILED = {
    ("paper-d128", 90): (*TRAINING, *ALONE),
    ("paper-d128", 80): TRAINING,
    ("short-d128", 90): TRAINING,
    ("short-packed", 90): ("forward", "backward"),
    ("paper", 90): (*TRAINING, *ALONE),
    ("group16-d64-packed", 90): TRAINING,
    ("group1-d64-packed", 90): TRAINING,
    ("group64-d128", 90): ("forward", "backward"),
    ("one-row", 90): ("forward", "backward"),
    ("group7-d128", 90): ("forward", "backward"),
    ("group24-d128", 90): ("forward", "backward"),
    ("group48-d64-packed", 90): ("forward", "backward"),
    **{(name, 90): ("forward", "backward") for name in GROUPED},
}


class Launch(NamedTuple):
    """A kernel and the arguments it was started with."""

    kernel: JITFunction
    arguments: dict[str, Any]


class Resources(NamedTuple):
    """What one program takes; bytes, and instructions as written in PTX."""

    registers: int
    stack: int
    local: int
    shared: int
    wgmma: int
    mma: int


@contextmanager
def recording(launches: list[Launch]) -> Iterator[None]:
    """Appends launches to a list instead of starting them."""

    def record(self: JITFunction, *, grid: object, warmup: bool, **arguments: Any) -> None:
        launches.append(Launch(self, arguments))

    with mock.patch.object(JITFunction, "run", record):
        yield


@cache
def kernels(layer: str, capability: int) -> dict[str, Launch]:
    """Every kernel of a layer that is compiled for an architecture, by ``step/kernel``.

    A kernel that two steps start alike belongs to the first; one that a step starts in several ways
    has a number after its name.
    """
    steps = COMPILED[layer, capability]
    tiled = {f"{name}_kernel" for name in tuned.table("sm90")}
    found: dict[str, Launch] = {}
    ways: set[str] = set()
    with tiles_of(capability):
        all_launches = _steps(LAYERS[layer])
    for step, launches in all_launches.items():
        for item in launches if step in steps else ():
            if layer in TILES_ONLY and item.kernel.__name__ not in tiled:
                continue
            way = repr((item.kernel.__name__, *_specialization(item), _options(item)))
            if way not in ways:
                ways.add(way)
                name = f"{step}/{item.kernel.__name__}"
                count = sum(key.split(" ")[0] == name for key in found)
                found[name if count == 0 else f"{name} {count + 1}"] = item
    return found


# Capability, kernel, padded widths and padded group size that a launch asked the tables for.
ASKED: set[tuple[int, str, int, int, int]] = set()


@contextmanager
def tiles_of(capability: int) -> Iterator[None]:
    """Lets launches take the tiles that they take on a GPU of ``sm_<capability>``."""
    find = tuned._measured

    def measured(kernel: str, sizes: dict[str, int], like: Tensor) -> tuned.Tile | None:
        ASKED.add((capability, kernel, sizes["DKP"], sizes.get("DVP", 0), sizes["GP"]))
        return find(kernel, sizes, like)

    def major(like: Tensor) -> int:
        return capability // 10

    with (
        mock.patch.object(tuned, "_measured", measured),
        mock.patch.object(tuned, "capability", major),
        mock.patch.object(hopper_forward, "capability", major),
        mock.patch.object(
            torch.cuda, "get_device_properties", return_value=mock.Mock(multi_processor_count=132)
        ),
        mock.patch.object(Tensor, "data_ptr", return_value=0),  # Descriptors look at its alignment.
    ):
        yield


def _steps(layer: Layer) -> dict[str, list[Launch]]:
    """Launches of training a layer, of its forward alone, and of each branch alone."""
    q, do, gates, k, v, k_cmp, v_cmp = _inputs(layer)
    config = layer.config
    compress = {
        "compress_block_size": config.compress_block_size,
        "compress_stride": config.compress_stride,
    }
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta") if layer.packed else None
    common: dict[str, Any] = {"cu_seqlens": cu_seqlens, "softmax_scale": q.shape[-1] ** -0.5}
    steps: dict[str, list[Launch]] = {}
    for name, weights in (("compress", True), ("mean", False)):
        given = [
            _weights(x, config.compress_block_size) if weights else (None, None, None)
            for x in (k, v)
        ]
        columns = ((k, v), *zip(*given, strict=True))
        where = {"cu_seqlens": cu_seqlens, "kind": "mlp" if weights else "mean", **compress}
        with recording(steps.setdefault(name, [])):
            compress_fwd(*columns, **where)
        with recording(steps.setdefault(f"{name}-backward", [])):
            compress_bwd((k_cmp, v_cmp), *columns, **where)
    inputs = (q, k_cmp, v_cmp, k, v, k, v, gates)
    whole = {"config": config, "max_seqlen": layer.max_seqlen, **common}
    with recording(steps.setdefault("forward", [])):
        _, *saved = launch.nsa_attention_fwd(*inputs, **whole)
    with recording(steps.setdefault("backward", [])):
        launch.nsa_attention_bwd(do, *inputs, tuple(saved), **whole)
    with recording(steps.setdefault("inference", [])):
        launch.nsa_attention_fwd(*inputs, **whole, save=False)
    chosen, o_cmp, lse_cmp, o, lse, _, _ = saved
    slc, win = {"block_size": config.block_size}, {"window_size": config.window_size}
    with recording(steps.setdefault("compressed-backward", [])):
        launch.compressed_attention_bwd(
            do, lse_cmp, q, k_cmp, v_cmp, o_cmp, lse_cmp, **compress, **common
        )
    with recording(steps.setdefault("selected", [])):
        launch.selected_attention_fwd(q, k, v, chosen, **slc, **common)
    with recording(steps.setdefault("selected-backward", [])):
        launch.selected_attention_bwd(do, None, q, k, v, chosen, o, lse, **slc, **common)
    with recording(steps.setdefault("window", [])):
        launch.window_attention_fwd(q, k, v, **win, **common)
    with recording(steps.setdefault("window-backward", [])):
        launch.window_attention_bwd(do, None, q, k, v, o, lse, **win, **common)
    return steps


def _weights(x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of an "mlp" compressor."""
    num_kv_heads, dim = x.shape[-2:]
    return (
        x.new_empty(num_kv_heads, block, dim),
        x.new_empty(dim, block * dim),
        x.new_empty(dim, dim),
    )


def _inputs(layer: Layer) -> list[Tensor]:
    """q, do, gates, k, v, k_cmp, v_cmp: only their shapes and dtypes are real."""
    (num_heads, num_kv_heads), (key_dim, value_dim) = layer.heads, layer.dims
    config, seq_len = layer.config, layer.seq_len
    rows = (seq_len,) if layer.packed else (1, seq_len)
    slots = (
        (seq_len // config.compress_stride,)
        if layer.packed
        else (1, config.num_compressed(seq_len))
    )
    shapes = [(*rows, num_heads, dim) for dim in (key_dim, value_dim, 3)]
    shapes += [
        (*where, num_kv_heads, dim) for where in (rows, slots) for dim in (key_dim, value_dim)
    ]
    return [torch.empty(shape, dtype=layer.dtype, device="meta") for shape in shapes]


def _specialization(
    item: Launch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Types, constants and attributes as Triton derives them from the arguments of a launch."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for i, parameter in enumerate(item.kernel.params):
        value, name = item.arguments[parameter.name], parameter.name
        special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
            attributes |= {(i,): ALIGNED} if aligned else {}
        elif isinstance(value, TensorDescriptor):
            dtype = POINTERS[value.base.dtype].removeprefix("*")
            box = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{dtype}[{box}],{value.layout!r}>"
        elif type(value) is int:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            attributes |= {(i,): ALIGNED} if special and value % 16 == 0 else {}
        elif type(value) is bool:
            signature[name] = "u1"
        else:
            assert type(value) is float, f"{name}: no rule for {value!r}"
            signature[name] = "fp32"
    return signature, constants, attributes


ALIGNED = [["tt.divisibility", 16]]
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compile_launch(item: Launch, capability: int) -> Resources:
    """Compiles for ``sm_<capability>`` and reads what the machine code takes."""
    kernel = compiled(item, capability)
    shown = _read(kernel, CUOBJDUMP, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    assert found is not None, f"cuobjdump printed no resources: {shown}"
    registers, stack, local = map(int, found.groups())
    wgmma, mma = (len(kind.findall(kernel.asm["ptx"])) for kind in (WGMMA, MMA))
    return Resources(registers, stack, local, kernel.metadata.shared, wgmma, mma)


def said_by_ptxas(item: Launch, capability: int) -> str:
    """What ptxas says of the kernel: spills, and products that wait for each other."""
    kernel = compiled(item, capability)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"])
        ptx.flush()
        command = [str(PTXAS), "-v", f"--gpu-name=sm_{capability}a", ptx.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def disassembly(item: Launch, capability: int) -> str:
    """The machine code of the kernel, as ``nvdisasm`` writes it."""
    return _read(compiled(item, capability), NVDISASM)


def _read(kernel: Any, tool: Path, *options: str) -> str:
    """What a tool prints of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(tool), *options, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiled(item: Launch, capability: int) -> Any:
    """The kernel as Triton compiles it for ``sm_<capability>``."""
    signature, constants, attributes = _specialization(item)
    kind = GluonASTSource if item.kernel.is_gluon() else ASTSource
    source = kind(item.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=_options(item))


def _options(item: Launch) -> dict[str, int]:
    return {name: item.arguments[name] for name in OPTIONS if name in item.arguments}


def record() -> None:
    """Compiles everything, prints what it takes and writes the table."""
    table: dict[str, dict[str, int]] = {}
    for layer, capability in COMPILED:
        for name, item in kernels(layer, capability).items():
            found = compile_launch(item, capability)
            table[f"{layer}/sm_{capability}/{name}"] = found._asdict()
            print(f"{layer}/sm_{capability}/{name}: {found}", flush=True)
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    version = json.dumps(triton.__version__)
    temporary = RECORDED.with_suffix(".tmp")
    text = f'{{\n "triton": {version},\n "kernels": {{\n{rows}\n }}\n}}\n'
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(RECORDED)


if __name__ == "__main__":
    record()
