"""The demo: trains a small NSA model and its dense twin on a book and reports on both."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nsa.bench.environment import provenance
from nsa.demo.report import Report, TwinReport, report_html, verdict
from nsa.demo.settings import (
    BOOK_TITLE,
    TWINS,
    DemoSettings,
    held_out_passages,
    read_book,
    write_data,
)
from nsa.inspect import tokenize, trace
from nsa.models import load_model
from nsa.serve.text import TextModel
from nsa.train import checkpoint
from nsa.train.files import write_text
from nsa.train.progress import LastingConsole
from nsa.train.run import TrainResult, train
from nsa.train.tokenizer import encode_documents
from nsa.train.validation import PositionLosses, consecutive_pieces, position_losses

_PROMPT_CHARS = 400


class DemoStopped(Exception):
    """A signal ended a training; its checkpoint is on disk.

    Args:
        signal_number: the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number


class DemoDidNotLearn(Exception):
    """Everything ran, but the sparse model's loss is not what a model that learned would have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trained:
    """One twin after training."""

    loaded: TextModel
    result: TrainResult
    tokens_per_second: float


def run_demo(
    folder: Path, *, settings: DemoSettings | None = None, console: Console | None = None
) -> Path:
    """Trains both twins, evaluates and inspects them, streams a sample and writes the report.

    What an earlier call left in ``folder`` is used: an interrupted demo goes on where it was.

    Args:
        folder: of the demo; made if needed.
        settings: sizes; those of ``nsa demo`` if None.
        console: where progress and the sample are shown.

    Returns:
        The report, ``folder / "report.html"``. Its numbers are in ``results.json`` beside it.

    Raises:
        DemoDidNotLearn: the loss is not ``settings.min_gain`` under the unigram entropy; the report
            is written nevertheless.
        DemoStopped: Ctrl-C or SIGTERM during a training, after its checkpoint was written.
        ValueError: ``folder`` holds a demo of other settings.
        CheckpointError: a checkpoint cannot be written, for want of space say.
        OSError: another file cannot be written.

    Example:
        >>> run_demo(Path("runs/demo"))
        PosixPath('runs/demo/report.html')
    """
    settings = settings or DemoSettings()
    console = console or LastingConsole(highlight=False)
    try:
        return _demo(folder, settings, console)
    except (KeyboardInterrupt, DemoStopped, checkpoint.CheckpointError):
        console.print(
            f"What is done is in {folder}. The same command goes on from there, without any flag.",
            style="yellow",
            markup=False,
        )
        raise


def _demo(folder: Path, settings: DemoSettings, console: Console) -> Path:
    start = None if (folder / TWINS[0]).exists() else time.monotonic()
    write_data(folder, settings)
    trained: dict[str, _Trained] = {}
    for number, name in enumerate(TWINS, start=1):
        kind = "Native Sparse Attention" if name == "nsa" else "its dense twin, same data"
        _step(console, number, f"Training {name}: {kind}, on {BOOK_TITLE}")
        trained[name] = _train(name, folder, settings, console)
    _step(console, 3, "Evaluating both on chapters they have not seen")
    _, held_out = read_book()
    tokenizer = trained["nsa"].loaded.tokenizer
    texts = held_out_passages(settings)
    documents = consecutive_pieces(list(encode_documents(tokenizer, texts)), settings.seq_len)
    losses = {
        name: _evaluate(name, twin, documents, settings, console) for name, twin in trained.items()
    }
    entropy = unigram_entropy(documents)
    _show_losses(losses, entropy, console)
    _step(console, 4, "Looking where the sparse model looks")
    with console.status("measuring selections, gates and recall"):
        ids, pieces = tokenize(tokenizer, texts[len(texts) // 2], settings.seq_len)
        looked = trace(trained["nsa"].loaded.model, ids, twin=trained["dense"].loaded.model)
    _step(console, 5, "The sparse model goes on with the first held-out chapter")
    prompt = held_out[:_PROMPT_CHARS].rsplit(" ", 1)[0]
    samples = {
        name: _sample(twin.loaded, prompt, settings, console, shown=name == "nsa")
        for name, twin in trained.items()
    }
    report = Report(
        settings=settings,
        twins=[
            TwinReport(
                name=name,
                num_parameters=twin.loaded.model.num_parameters(),
                tokens_per_second=twin.tokens_per_second,
                losses=twin.result.losses,
                validation_losses=twin.result.validation_losses,
                validation=losses[name],
                sample=samples[name],
            )
            for name, twin in trained.items()
        ],
        unigram_entropy=entropy,
        prompt=prompt,
        trace=looked,
        pieces=pieces,
        seconds=None if start is None else time.monotonic() - start,
    )
    return _conclude(report, folder, trained["nsa"].loaded.model.device, console)


def _conclude(report: Report, folder: Path, device: torch.device, console: Console) -> Path:
    """Writes the report and its numbers, and says whether the sparse model learned."""
    path, numbers = folder / "report.html", folder / "results.json"
    write_text(path, report_html(report))
    write_text(numbers, json.dumps(summary(report) | provenance(device)) + "\n")
    if not report.learned:
        raise DemoDidNotLearn(
            f"{verdict(report)} See {path}. Remove {folder} to train anew; if that ends like this "
            f"too, please report it with {numbers}."
        )
    console.print(
        f"\n{verdict(report)}\n"
        f"Report: {path.resolve()} (open it in a browser; it needs no network)\n"
        f'Try: {_command()} generate --model {folder / "nsa" / "model"} --prompt "The whale"',
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    return path


def summary(report: Report) -> dict[str, object]:
    """The report's numbers, as plain values: what ``results/demo.jsonl`` keeps of a run."""
    return {
        "book": BOOK_TITLE,
        "unigram_entropy": report.unigram_entropy,
        "seconds": report.seconds,
        "train_tokens": report.settings.max_steps
        * report.settings.batch_rows
        * report.settings.seq_len,
        "twins": {
            twin.name: {
                "num_parameters": twin.num_parameters,
                "tokens_per_second": twin.tokens_per_second,
                "loss": twin.validation.loss,
                "num_tokens": twin.validation.num_tokens,
            }
            for twin in report.twins
        },
    }


def _command() -> str:
    """How to call ``nsa`` here: under ``make demo`` its folder is not on the search path."""
    return "nsa" if shutil.which("nsa") else str(Path(sys.executable).with_name("nsa"))


def _step(console: Console, number: int, title: str) -> None:
    console.print(f"\n[{number}/5] {title}", style="bold", markup=False)


def _train(name: str, folder: Path, settings: DemoSettings, console: Console) -> _Trained:
    config = settings.train_config(name, folder)
    before, _ = checkpoint.latest_checkpoint(folder / name)
    first_step = int(before.name.rsplit("-", 1)[1]) if before else 0
    start = time.monotonic()
    result = train(config, resume=True, console=console, show_config=False)
    speed_file = folder / name / "speed.json"
    if result.step > first_step:
        tokens = (result.step - first_step) * settings.batch_rows * settings.seq_len
        seconds = time.monotonic() - start
        write_text(speed_file, json.dumps({"tokens": tokens, "seconds": seconds}))
    if result.model_dir is None:
        raise DemoStopped(result.signal_number or 0)
    speed = json.loads(speed_file.read_text(encoding="utf-8"))
    model, tokenizer = load_model(result.model_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _Trained(
        loaded=TextModel(model=model.to(device), tokenizer=tokenizer),  # pyright: ignore[reportArgumentType]
        result=result,
        tokens_per_second=speed["tokens"] / speed["seconds"],
    )


def _evaluate(
    name: str,
    twin: _Trained,
    documents: Sequence[Sequence[int] | np.ndarray],
    settings: DemoSettings,
    console: Console,
) -> PositionLosses:
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(documents))
        return position_losses(
            twin.loaded.model,
            documents,
            max_len=settings.seq_len,
            batch_tokens=4 * settings.seq_len,
            on_documents=lambda done: progress.update(bar, completed=done),
        )


def unigram_entropy(documents: Sequence[Sequence[int] | np.ndarray]) -> float:
    """Entropy in nats of the tokens that are predicted: what knowing only their counts leaves."""
    _, counts = np.unique(np.concatenate([ids[1:] for ids in documents]), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _show_losses(losses: dict[str, PositionLosses], entropy: float, console: Console) -> None:
    gap = losses["nsa"].loss - losses["dense"].loss
    console.print(
        f"held-out loss in nats per token: nsa {losses['nsa'].loss:.3f}, "
        f"dense {losses['dense'].loss:.3f} (nsa {gap:+.3f}); "
        f"unigram entropy {entropy:.3f}, {losses['nsa'].num_tokens:,} tokens",
        markup=False,
    )


def _sample(
    loaded: TextModel, prompt: str, settings: DemoSettings, console: Console, *, shown: bool
) -> str:
    """A continuation of ``prompt``; written to the screen word by word if ``shown``."""
    start, *words = loaded.tokenizer(prompt)["input_ids"]
    ids = [start, *words[-(settings.seq_len - settings.sample_tokens - 1) :]]

    def show(piece: str) -> None:
        if shown:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

    if shown:
        console.print(prompt, end="", style="dim", markup=False, soft_wrap=True)
    made = loaded.stream(
        ids, on_text=show, max_new_tokens=settings.sample_tokens, temperature=0.7, seed=0
    )
    show("\n")
    if shown:
        console.print(made.summary(), style="dim")
    return made.text
