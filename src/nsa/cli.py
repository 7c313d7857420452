"""The `nsa` command: parses, calls one function of the package, prints.

Commands import what they run inside their body: `nsa --help` does not wait for transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from nsa import __version__
from nsa.bench.commands import Device, bench_app, pick_device

app = typer.Typer(
    name="nsa",
    help="Native Sparse Attention: train, generate, evaluate, inspect, convert and benchmark.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bench_app, name="bench")

# What a command raises when its input or the machine is at fault; all else is a bug of ours and
# shows its traceback, as does an ImportError that does not name an extra to install.
USER_ERRORS = (ValueError, OSError, NotImplementedError, ImportError)

Model = Annotated[Path, typer.Option("--model", help="Folder of a trained model.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens to write at most; 200 by default.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Samples from the likeliest tokens of this mass; no effect at temperature 0.",
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Makes sampling repeatable.")]


def main() -> None:
    """Entry point: one line and exit code 2 for bad input, exit code 130 for Ctrl-C.

    `python -X dev -m nsa.cli ...` shows the traceback of bad input too.
    """
    console = Console(stderr=True, highlight=False)
    try:
        app()
    except USER_ERRORS as error:
        ours = isinstance(error, ImportError) and "pip install" not in str(error)
        if ours or sys.flags.dev_mode:
            raise
        _print_error(console, error)
        sys.exit(2)
    except (SystemExit, KeyboardInterrupt) as leaving:
        if isinstance(leaving, SystemExit) and leaving.code != 130:
            raise
        console.print("Interrupted.", style="yellow")
        sys.exit(130)


def _print_error(console: Console, error: Exception) -> None:
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}."
    console.print("Error:", message, style="red", markup=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nsa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `nsa` itself."""


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 file to continue.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Continue a text; tokens appear as they are made."""
    from nsa.serve import text

    if (prompt is None) == (prompt_file is None):
        raise ValueError("--prompt, --prompt-file: expected exactly one of them.")
    given = prompt if prompt_file is None else text.read_prompt(prompt_file)
    assert given is not None
    text.check_text(given)
    loaded = text.load(model, device=pick_device(device))
    typer.echo(given, nl=False)
    try:
        made = loaded.stream(
            given,
            on_text=_echo,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    finally:
        typer.echo()
    Console(stderr=True).print(made.summary(), style="dim")


@app.command()
def chat(
    model: Model,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it."""
    from nsa.serve import text

    talk = text.Chat(loaded=text.load(model, device=pick_device(device)))
    console = Console(stderr=True)
    console.print(talk.introduction(), style="dim")
    while message := _ask():
        forgotten = talk.num_forgotten
        try:
            made = talk.reply(
                message,
                on_text=_echo,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
        except ValueError as error:
            _print_error(console, error)
            continue
        typer.echo()
        console.print(made.summary(), style="dim")
        if talk.num_forgotten > forgotten:
            console.print(
                "The conversation is longer than what the model can read; it has forgotten the "
                f"oldest part ({talk.num_forgotten} of your messages so far).",
                style="yellow",
            )


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        typer.echo()
        return ""


def _echo(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


@app.command()
def env(device: Device = None) -> None:
    """Show versions, the device, and which code each operation runs on it and why."""
    from nsa.bench import environment

    environment.show(Console(), pick_device(device))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/ and docs/training.md.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value over the file's; may be repeated."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
) -> None:
    """Train a model from text files; Ctrl-C saves a checkpoint and stops.

    Several devices: torchrun --nproc-per-node N --no-python nsa train CONFIG.
    """
    from nsa.train.config import load_config
    from nsa.train.progress import LastingConsole
    from nsa.train.run import train as run_training

    console = LastingConsole(highlight=False)
    result = run_training(load_config(config, overrides or ()), resume=resume, console=console)
    leads = True
    if torch.distributed.is_initialized():
        leads = torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
    if result.signal_number is not None:
        if leads:
            console.print("Go on with the same command and --resume.")
        raise typer.Exit(128 + result.signal_number)


@app.command()
def convert(
    model: Annotated[Path, typer.Option(help="Folder of a dense Llama, Qwen2 or Qwen3 model.")],
    output: Annotated[Path, typer.Option(help="The new folder.")],
    compressor: Annotated[str, typer.Option(help="mlp, linear, gated or mean.")] = "mlp",
    shared_kv: Annotated[
        bool, typer.Option("--shared-kv", help="One pair of keys and values for all branches.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Geometry, such as window_size=256; may be repeated."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file on which both models are compared.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Turn a dense model into a sparse one that starts where it stopped; to be trained further."""
    from nsa.models.conversion import convert_folder, read_geometry
    from nsa.serve.text import read_prompt

    torch.manual_seed(seed or 0)
    report = convert_folder(
        model,
        output,
        config=read_geometry(overrides or ()),
        compressor=compressor,
        kv_per_branch=not shared_kv,
        text=None if text is None else read_prompt(text),
    )
    Console().print(report)
    typer.echo(f"Wrote {output}.")


@app.command()
def inspect(
    model: Model,
    text: Annotated[Path, typer.Option(help="UTF-8 file the model reads, from its start.")],
    output: Annotated[Path, typer.Option(help="The page to write, .html.")],
    twin: Annotated[
        Path | None,
        typer.Option(help="Folder of the dense twin or source, to compare with its attention."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at most.")] = 1024,
    layer: Annotated[
        list[int] | None, typer.Option(help="Only this layer; may be repeated.")
    ] = None,
    device: Device = None,
) -> None:
    """Write a page that shows where a model looks in a text; it opens without a network."""
    from nsa.inspect import inspect_text

    num_tokens = inspect_text(
        model,
        text,
        output,
        device=pick_device(device),
        twin=twin,
        max_tokens=max_tokens,
        layers=layer,
    )
    typer.echo(f"Read {num_tokens:,} tokens. Wrote {output}: open it in a browser.")


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[
        list[Path] | None, typer.Option(help="Long documents, for perplexity by position.")
    ] = None,
    haystack: Annotated[
        list[Path] | None, typer.Option(help="Text to hide needles in, for the needle test.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, such as lambada_openai,arc_easy,mmlu.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder with data of well-known tasks; else the Hub.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, see docs/evaluation.md; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents, needles per cell, questions per task.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results; a new one in runs/eval by default.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Measure a model: perplexity by position, needles in a haystack, task suites.

    Files and folders are those that `nsa train` reads; options that name them may be repeated.
    """
    from nsa.eval.run import Evaluation, default_output, evaluate
    from nsa.eval.settings import EvalSettings

    evaluation = Evaluation(
        text=tuple(text or ()),
        haystack=tuple(haystack or ()),
        tasks=tuple(name.strip() for name in tasks.split(",")) if tasks else (),
        task_data=task_data,
        settings=EvalSettings.from_overrides(overrides or ()),
        limit=limit,
        seed=seed or 0,
    )
    evaluate(
        model,
        evaluation,
        output=output or default_output(model),
        device=pick_device(device),
        console=Console(highlight=False),
    )


@app.command("needle-data")
def needle_data(
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer, or of a model.")],
    haystack: Annotated[list[Path], typer.Option(help="Text to hide needles in.")],
    output: Annotated[Path, typer.Option(help="JSON lines to write, .jsonl.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens of a document at most.")] = 4096,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    keys: Annotated[int, typer.Option(min=1, help="Needles, and questions, in each.")] = 4,
    digits: Annotated[int, typer.Option(min=1, help="Digits of the hidden numbers.")] = 7,
    seed: Seed = 0,
) -> None:
    """Write documents that teach a model the needle test of `nsa eval`."""
    from nsa.eval.needle import training_documents
    from nsa.eval.needle_data import read_haystack, write_documents

    made = training_documents(
        read_haystack(haystack, tokenizer, name="--haystack"),
        length=length,
        num_documents=documents,
        num_keys=keys,
        num_digits=digits,
        seed=seed or 0,
    )
    write_documents(output, made, num_documents=documents)
    typer.echo(f"Wrote {documents:,} documents to {output}.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("runs/demo"),
) -> None:
    """Train a small NSA model and its dense twin on a book, and report; minutes on a CPU.

    Exit code 1 if the sparse model did not learn.
    """
    from nsa.demo import DemoDidNotLearn, DemoStopped, run_demo

    try:
        run_demo(output)
    except DemoStopped as stopped:
        raise typer.Exit(128 + stopped.signal_number) from None
    except DemoDidNotLearn as failure:
        _print_error(Console(stderr=True, highlight=False), failure)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    main()
