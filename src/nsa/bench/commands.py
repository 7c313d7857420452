"""The `nsa bench` commands. What they run is imported when they run: `nsa --help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

bench_app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)

RESULTS = Path("results/ops.jsonl")
GRAPHS = Path("results/graphs.jsonl")
TRAINING = Path("results/training.jsonl")
RUNS = Path("runs/bench-training")
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; a GPU if there is one by default.")
]
BenchShape = Annotated[
    str | None,
    typer.Option(
        help="tiny, laptop, 100m, paper-d128, paper, million, group-1, -2, -4, -8, "
        "padded-group-12, -24, -48, the same with broad-; wide-group-1, -2, -4, "
        "wide-padded-group-12, -24, -48, the same with narrow-; odd-group-8, "
        "odd-padded-group-12, -24, -48."
    ),
]


def pick_device(name: str | None) -> torch.device:
    """``name`` as a device that is there; a GPU if there is one, else the CPU, if None.

    A GPU that is asked for by number becomes the current one, where streams and kernels start.

    Raises:
        ValueError: PyTorch does not know the name, or does not see or cannot use the device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cpu, cuda, cuda:1 ..., got {name!r}.") from error
    seen = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ValueError(f"--device: got {name!r}, but PyTorch sees {seen} CUDA devices here.")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(f"--device: got {name!r}, which PyTorch cannot use here.") from error
    return device


@bench_app.command("ops")
def bench_ops(  # noqa: PLR0913 - a parameter is an option here
    operation: Annotated[list[str] | None, typer.Option(help="All but recompute_pipeline.")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="All that run here.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="forward, backward; both.")] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="random, local; both. Or trace:FILE.")
    ] = None,
    compressor: Annotated[list[str] | None, typer.Option(help="mlp, mean; both.")] = None,
    shape: BenchShape = None,
    seq_len: Annotated[list[int] | None, typer.Option(help="Tokens; the shape's list.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on CUDA, else float32.")] = None,
    device: Device = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds: tiny, few repeats.")] = False,
    graph: Annotated[
        bool, typer.Option("--graph", help="Start each call as one CUDA graph.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help=f"JSON lines to append to; {RESULTS}, of graphs {GRAPHS}."),
    ] = None,
) -> None:
    """Time every operation against its alternatives, after checking that each is right.

    Options that name several things may be repeated. A provider whose result is wrong gets no
    numbers, and the command ends with exit code 1.
    """
    from nsa.bench.run import Plan, run_and_report

    plan = Plan(
        device=pick_device(device),
        operations=tuple(operation or ()),
        providers=tuple(provider or ()),
        modes=tuple(mode or ()),
        workloads=tuple(workload or ()),
        compressors=tuple(compressor or ()),
        shape=shape,
        seq_lens=tuple(seq_len or ()),
        dtype=dtype,
        quick=quick,
        graph=graph,
    )
    if not run_and_report(plan, output or (GRAPHS if graph else RESULTS), Console()):
        raise typer.Exit(1)


@bench_app.command("split")
def bench_split(
    operation: Annotated[str, typer.Option(help="One operation.")] = "pipeline",
    provider: Annotated[str | None, typer.Option(help="kernel on CUDA, else reference.")] = None,
    workload: Annotated[str, typer.Option(help="random, local or trace:FILE.")] = "local",
    compressor: Annotated[str, typer.Option(help="mlp or mean.")] = "mlp",
    shape: BenchShape = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens; the shape's first.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on CUDA, else float32.")] = None,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="JSON lines to append to.")] = Path(
        "results/kernels.jsonl"
    ),
) -> None:
    """Show where the time of one operation goes: the device time of each kernel it starts."""
    from nsa.bench.run import Plan
    from nsa.bench.split import split_and_report

    place = pick_device(device)
    plan = Plan(
        device=place,
        operations=(operation,),
        providers=(provider or ("kernel" if place.type == "cuda" else "reference"),),
        workloads=(workload,),
        compressors=(compressor,),
        shape=shape,
        seq_lens=() if seq_len is None else (seq_len,),
        dtype=dtype,
        one_length=True,
    )
    split_and_report(plan, output, Console())


@bench_app.command("trace")
def bench_trace(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    text: Annotated[Path, typer.Argument(help="UTF-8 file the model reads, from its start.")],
    output: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    layer: Annotated[int, typer.Option(min=0, help="Layer, counted from 0.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at most.")] = 65536,
    device: Device = None,
) -> None:
    """Keep what a trained layer hands to its operations, to measure with it.

    Then: nsa bench ops --workload trace:FILE.
    """
    from nsa.bench import traces

    place = pick_device(device)
    shape = traces.capture(model, text, output, device=place, layer=layer, max_tokens=max_tokens)
    typer.echo(f"Read {shape.seq_lens[0]:,} tokens. Wrote {output}.")


@bench_app.command("tune")
def bench_tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="As of `ops`; by default those that start these kernels on this GPU."),
    ] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="All by default.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens.")] = 32768,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option(help="Table to write; the package's own by default.")
    ] = None,
) -> None:
    """Try tiles of the GPU kernels and write the fastest right ones into the launch table.

    Hopper's own kernels have no tiles to try.
    """
    from nsa.bench.tune import tune

    path = tune(
        shape or [],
        kernel or [],
        seq_len=seq_len,
        device=pick_device(device),
        console=Console(),
        output=output,
    )
    if path is None:
        typer.echo("Wrote nothing: no kernel of the table was measured.")
    else:
        typer.echo(f"Wrote {path}. Renew tests/kernels/resources.json with it.")


@bench_app.command("training")
def bench_training(
    config: Annotated[Path, typer.Argument(help="YAML file of `nsa train`.")],
    arm: Annotated[
        list[str] | None, typer.Option(help="kernel, reference, dense; all that run here.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value over the file's; may be repeated."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the runs are kept.")] = RUNS,
    output: Annotated[Path, typer.Option(help="JSON lines to append to.")] = TRAINING,
) -> None:
    """Train one model with the kernels, with the reference, and its dense twin.

    For 200 steps, unless --set training.max_steps=N says another number.

    Ctrl-C saves a checkpoint and stops; the same command goes on.
    """
    from nsa.bench.training import compare
    from nsa.train.config import load_config
    from nsa.train.progress import LastingConsole

    console = LastingConsole(highlight=False)
    settings = load_config(config, ["training.max_steps=200", *(overrides or ())])
    stopped_by = compare(
        settings, config.stem, arm or (), folder=folder, output=output, console=console
    )
    if stopped_by is not None:
        console.print("Go on with the same command.")
        raise typer.Exit(128 + stopped_by)


@bench_app.command("table")
def bench_table(
    root: Annotated[Path, typer.Option(help="The checkout to refresh.")] = Path(),
) -> None:
    """Write the generated parts of README.md anew from results/ and the sources."""
    from nsa.bench import readme

    path = root / "README.md"
    readme.write(path, root)
    typer.echo(f"Refreshed {path}.")


@bench_app.command("plot")
def bench_plot(
    results: Annotated[Path, typer.Option(help="JSON lines of `nsa bench ops`.")] = RESULTS,
    output: Annotated[Path, typer.Option(help=".svg, .png or .pdf.")] = Path("ops.svg"),
    speedup: Annotated[
        bool, typer.Option("--speedup", help="The layer's speed-up over dense attention instead.")
    ] = False,
    shape: Annotated[str | None, typer.Option(help="Only this shape.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Only this dtype.")] = None,
    device_name: Annotated[str | None, typer.Option(help="Only names with this in them.")] = None,
) -> None:
    """Draw time against length for each operation and provider."""
    from nsa.bench.plot import plot, plot_speedup
    from nsa.bench.results import read

    rows = [
        row
        for row in read(results)
        if shape in (None, row["shape"])
        and dtype in (None, row["dtype"])
        and (device_name is None or device_name.lower() in row["device"].lower())
    ]
    (plot_speedup if speedup else plot)(rows, output)
    typer.echo(f"Wrote {output}.")
