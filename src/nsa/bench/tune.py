"""Measures tiles of our kernels and writes the best into the launch table (``nsa bench tune``).

Each kernel is tried with the tile in use and a short list of others on the data of one layer. One
that spills registers, or whose result is not that of the tile in use, is not a candidate. Nothing
here runs on a user's machine.

Hopper's own kernels have no tiles to try. On sizes that they take, those of the table are not
started, and nothing is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from torch import Tensor
from triton.runtime import JITFunction

import nsa.kernels
from nsa.bench.correctness import BOUNDS, output_gradient
from nsa.bench.environment import device_name
from nsa.bench.results import significant
from nsa.bench.shapes import SHAPES, Shape
from nsa.bench.split import KernelTime, kernel_times
from nsa.bench.workloads import add_selection, make_tensors
from nsa.ops import launch
from nsa.ops.launch import tuned
from nsa.ops.launch.tiles import heads
from nsa.ops.launch.token_attention import token_attention_fwd
from nsa.ops.launch.tuned import Tile
from nsa.train.files import write_text

Step = Callable[[], tuple[Tensor, ...]]
Entry = dict[str, Any]

# Share of entries of integer results that must agree: near-ties of scores flip with rounding.
AGREEMENT = 0.98
# A tile that is faster than the one in use by less is not taken: the next run may say otherwise.
TIE = 0.02
# Registers of a thread, 4 bytes each, that a candidate may spill: another Triton has room for them.
SPILLED = 4

# Shapes that are tuned unless others are asked for. Hopper's own kernels take groups of 5 to 64
# heads, and compressed attention in groups of any size, at all widths but the broad and the odd
# ones. Block scores of 192 and 256 dims read the same entry, and the last that is measured stays.
LARGE = ("padded-group-48", "padded-group-24", "padded-group-12", "group-8")
ON_HOPPER = (
    *(f"{widths}{group}" for widths in ("broad-", "odd-") for group in LARGE),
    *(f"{widths}group-{n}" for widths in ("broad-", "", "wide-", "narrow-") for n in (1, 2, 4)),
)
ELSEWHERE = ("paper-d128", "paper", "100m", "group-1", "group-2", "group-4", "group-8")


class Tunable(NamedTuple):
    """A kernel of the table: its function, that of Hopper's own kernel, the step that starts them.

    And the tiles that are tried: rows and keys of a step, warps, stages.
    """

    function: str
    hopper: str
    step: str
    tiles: tuple[tuple[int, int, int, int], ...]


TUNABLES = {
    "compressed_attention_fwd": Tunable(
        "compressed_attention_fwd_kernel",
        "hopper_attention_fwd_kernel",
        "compressed",
        (
            *((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
            *((128, 32, 8, 3), (64, 64, 8, 2)),
        ),
    ),
    "block_scores": Tunable(
        "block_scores_kernel",
        "hopper_scores_kernel",
        "select",
        ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
    ),
    "token_attention_fwd": Tunable(
        "token_attention_fwd_kernel",
        "hopper_token_attention_fwd_kernel",
        "tokens",
        (
            *((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3)),
            (64, 32, 8, 3),
        ),
    ),
    "dq": Tunable(
        "dq_kernel",
        "hopper_dq_kernel",
        "backward",
        (
            *((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 16, 4, 3), (64, 32, 8, 3)),
            *((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2)),
        ),
    ),
    "range_dkv": Tunable(
        "range_dkv_kernel",
        "hopper_range_dkv_kernel",
        "backward",
        (
            *((32, 64, 4, 3), (32, 64, 4, 2), (32, 64, 8, 2), (64, 64, 4, 3), (64, 128, 8, 2)),
            *((16, 128, 8, 1), (64, 32, 8, 2), (64, 32, 4, 2), (64, 16, 4, 2)),
        ),
    ),
    "selected_dkv": Tunable(
        "selected_dkv_kernel",
        "hopper_selected_dkv_kernel",
        "backward",
        (
            *((32, 64, 4, 3), (32, 64, 4, 2), (32, 64, 8, 2), (64, 64, 4, 3), (16, 64, 8, 2)),
            *((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        ),
    ),
}


def tune(
    shapes: Sequence[str],
    kernels: Sequence[str],
    *,
    seq_len: int,
    device: torch.device,
    console: Console,
    output: Path | None = None,
) -> Path | None:
    """Tries the tiles of each kernel on each shape and writes the launch table after each kernel.

    Args:
        shapes: names in ``SHAPES``; ``ON_HOPPER`` or ``ELSEWHERE`` if empty.
        kernels: names in ``TUNABLES``, all if empty.
        seq_len: tokens of the data.
        device: a GPU.
        console: prints one line a tile.
        output: the table; the package's own for this architecture if None.

    Returns:
        The file written, or None if no kernel was measured.

    Raises:
        ValueError: a name is unknown, or the device is no GPU.
    """
    for field, names, known in (("shape", shapes, SHAPES), ("kernel", kernels, TUNABLES)):
        for name in names:
            if name not in known:
                raise ValueError(f"{field}: expected one of {', '.join(known)}, got {name!r}.")
    if device.type != "cuda":
        raise ValueError(f"device: expected a GPU, got {device}. Tiles are measured, not guessed.")
    arch = f"sm{torch.cuda.get_device_capability(device)[0]}0"
    path = output or Path(nsa.kernels.__path__[0]) / "tuned" / f"{arch}.json"
    written = None
    try:
        for shape in shapes or (ON_HOPPER if arch == "sm90" else ELSEWHERE):
            steps, like = problem(SHAPES[shape], seq_len, device)
            for kernel in kernels or TUNABLES:
                best = best_tile(kernel, steps, like, arch, device, console)
                if best is not None:
                    tuned.table(arch)[kernel] = merged(tuned.table(arch).get(kernel, []), best)
                    write_table(path, tuned.table(arch))
                    written = path
    finally:
        tuned.table.cache_clear()  # From here on the launches read what is on disk.
    return written


def problem(shape: Shape, seq_len: int, device: torch.device) -> tuple[dict[str, Step], Entry]:
    """The steps of a layer on "local" data, and the entry of the table that its sizes read."""
    config, dtype = shape.config, torch.bfloat16
    x = add_selection(make_tensors(shape, seq_len, "local", dtype, device), config, "kernel")
    scale = shape.key_dim**-0.5
    compress: dict[str, Any] = {
        "compress_block_size": config.compress_block_size,
        "compress_stride": config.compress_stride,
    }
    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (x[name] for name in names)
    o, *saved = launch.nsa_attention_fwd(
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config=config, softmax_scale=scale
    )
    indices, o_cmp, lse = saved[:3]
    do = output_gradient(o)

    def compressed() -> tuple[Tensor, ...]:
        return launch.compressed_attention_fwd(q, k_cmp, v_cmp, softmax_scale=scale, **compress)

    def select() -> tuple[Tensor, ...]:
        return (launch.select_blocks(q, k_cmp, lse, config=config, softmax_scale=scale),)

    def tokens() -> tuple[Tensor, ...]:
        out = token_attention_fwd(
            q,
            (k_slc, v_slc, indices),
            (k_win, v_win),
            gates,
            o_cmp,
            block_size=config.block_size,
            window_size=config.window_size,
            softmax_scale=scale,
        )
        return tuple(out.values())

    def backward() -> tuple[Tensor, ...]:
        return launch.nsa_attention_bwd(
            do,
            q,
            k_cmp,
            v_cmp,
            k_slc,
            v_slc,
            k_win,
            v_win,
            gates,
            tuple(saved),
            config=config,
            softmax_scale=scale,
        )

    found = heads(q, k_slc, v_slc)
    entry = {"key_dim": found["DKP"], "value_dim": found["DVP"], "group": found["GP"]}
    steps = {"compressed": compressed, "select": select, "tokens": tokens, "backward": backward}
    return steps, entry


def best_tile(
    kernel: str,
    steps: dict[str, Step],
    like: Entry,
    arch: str,
    device: torch.device,
    console: Console,
) -> Entry | None:
    """The fastest right tile as an entry of the table.

    None if none runs, or if the step does not start the kernel on these sizes.
    """
    tunable = TUNABLES[kernel]
    step = steps[tunable.step]
    say = partial(console.print, highlight=False, soft_wrap=True)
    like = {**like, "value_dim": 0} if kernel == "block_scores" else like
    times = kernel_times(step, device)
    if kernel_ms(times, tunable.function) is None:
        other = kernel_ms(times, tunable.hopper) is not None
        reason = f": {tunable.hopper} takes them" if other else ""
        say(f"{kernel} {like}: not started on these sizes{reason}")
        return None
    expected, current = step(), tile_in_use(kernel, like, device)
    others = (tuned.fitted(kernel, Tile(*tile), like["group"]) for tile in tunable.tiles)
    timed: dict[Tile, float] = {}
    for candidate in dict.fromkeys((current, *others)):
        with using(arch, kernel, {**like, "tile": list(candidate)}):
            result = measure(step, expected, tunable.function, device)
        if isinstance(result, float):
            timed[candidate] = result
            result = f"{significant(result)} ms"
        mark = " (in use)" if candidate == current else ""
        say(f"{kernel} {like} {list(candidate)}{mark}: {result}")
    if not timed:
        return None
    tile = fastest(timed, current)
    measured = {"ms": round(timed[tile], 4), "gpu": device_name(device)}
    return {**like, "tile": list(tile), **measured, "triton": triton.__version__}


def measure(
    step: Step, expected: tuple[Tensor, ...], function: str, device: torch.device
) -> float | str:
    """Milliseconds of a kernel with the tile that is set, or what is wrong with it."""
    with spills(function) as registers:
        try:
            problem = difference(step(), expected)
        except (triton.TritonError, RuntimeError) as error:
            problem = str(error).splitlines()[0]
    if problem is None and max(registers, default=0) > SPILLED:
        problem = f"spills {4 * max(registers)} bytes a thread"
    if problem is not None:
        return problem
    milliseconds = kernel_ms(kernel_times(step, device), function)
    return "not seen by the profiler" if milliseconds is None else milliseconds


@contextmanager
def spills(function: str) -> Iterator[list[int]]:
    """Collects the registers that a thread spills, of each start of a kernel."""
    run, found = JITFunction.run, []

    def record(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel: Any = run(self, *args, **kwargs)
        if self.__name__ == function:
            found.append(kernel.n_spills)
        return kernel

    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = run


def tile_in_use(kernel: str, like: Entry, device: torch.device) -> Tile:
    """What the launches take now for the sizes of an entry."""
    sizes = {"DKP": like["key_dim"], "DVP": like["value_dim"], "GP": like["group"]}
    return tuned.tile(kernel, sizes, torch.empty(0, dtype=torch.bfloat16, device=device))


def fastest(timed: dict[Tile, float], current: Tile) -> Tile:
    """The tile of the fewest milliseconds; the current one where it takes no more than 2% more."""
    best = min(timed, key=lambda tile: timed[tile])
    return current if timed.get(current, float("inf")) <= timed[best] * (1 + TIE) else best


def kernel_ms(times: list[KernelTime], function: str) -> float | None:
    """Device time of one kernel in a call, in milliseconds, or None if the call starts none."""
    found = [item.ms for item in times if item.kernel.startswith(function)]
    return sum(found) if found else None


def difference(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """What is wrong with a result, or None."""
    for number, (x, y) in enumerate(zip(got, expected, strict=True)):
        if not y.is_floating_point():
            agreement = float((x == y).double().mean())
            if agreement < AGREEMENT:
                return f"output {number} agrees in {agreement:.1%} of entries only"
            continue
        finite = y.isfinite()
        if not torch.equal(finite, x.isfinite()):
            return f"output {number} is finite elsewhere"
        x, y = x.masked_fill(~finite, 0).float(), y.masked_fill(~finite, 0).float()
        error = float((x - y).norm() / y.norm().clamp(min=1e-20))
        if not error <= BOUNDS[torch.bfloat16]:
            return f"output {number} is off by {error:.1e}"
    return None


@contextmanager
def using(arch: str, kernel: str, entry: Entry) -> Iterator[None]:
    """Lets the launches read one entry for a kernel."""
    table = tuned.table(arch)
    before = table.get(kernel)
    table[kernel] = [entry]
    try:
        yield
    finally:
        if before is None:
            del table[kernel]
        else:
            table[kernel] = before


def merged(entries: list[Entry], new: Entry) -> list[Entry]:
    """Entries of a kernel with a new one, which replaces that of the same sizes."""
    key = ("key_dim", "value_dim", "group")
    others = [entry for entry in entries if any(entry[name] != new[name] for name in key)]
    return sorted([*others, new], key=lambda e: (-e["key_dim"], -e["value_dim"], e["group"]))


def write_table(path: Path, table: dict[str, list[Entry]]) -> None:
    """Writes a launch table, one entry a line, so that a change of one shows as one."""
    parts = []
    for kernel, entries in table.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        parts.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")
