"""How a model trains with the kernels, beside the reference and its dense twin.

``nsa bench training`` runs ``nsa train`` for each and keeps losses and tokens per second.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from nsa.bench.environment import provenance
from nsa.bench.results import ARMS, Row, append
from nsa.models import NSAForCausalLM, NSAModelConfig
from nsa.train.config import TrainConfig
from nsa.train.files import write_text
from nsa.train.run import TrainResult, curve_settings, train


def compare(
    config: TrainConfig,
    name: str,
    arms: Sequence[str],
    *,
    folder: Path,
    output: Path,
    console: Console,
) -> int | None:
    """Trains the model of ``config`` once for each arm and appends a row for each that ends.

    A run that was stopped goes on when it is asked for again. Under torchrun every process calls
    this, and the first of them writes.

    Args:
        config: the run; its ``training.output_dir`` and ``model.attention`` are not used.
        name: of the config, for tables.
        arms: of ``ARMS``; "kernel" and "reference" are the sparse model, "dense" its twin. All that
            run here if empty: there are no kernels without a GPU.
        folder: where the runs are kept.
        output: JSON lines to append to.
        console: where progress is shown.

    Returns:
        The number of the signal that stopped a run, else None.

    Raises:
        ValueError: an unknown arm, or kernels without a GPU; see also :func:`nsa.train.run.train`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = ARMS if device.type == "cuda" else ARMS[1:]
    for arm in arms:
        if arm not in here:
            raise ValueError(f"--arm: expected one of {', '.join(here)} here, got {arm!r}.")
    leads = os.environ.get("RANK", "0") == "0"
    for arm in arms or here:
        if leads:
            console.print(f"\n{arm}", style="bold", markup=False)
        run = folder / name / (f"{arm}-compiled" if config.training.compile else arm)
        kind = "dense" if arm == "dense" else "nsa"
        arm_config = replace(
            config,
            model={**config.model, "attention": kind},
            training=replace(config.training, output_dir=str(run)),
        )
        with _backend("reference" if arm == "reference" else None):
            result = train(arm_config, resume=True, console=console, show_config=False)
        speed = _speed(result) if leads else None
        if result.model_dir is None:
            return result.signal_number
        if leads:
            measured = _measured(arm_config, result, speed)
            append(output, [{"config": name, "arm": arm, **measured, **provenance(device)}])
    return None


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """Lets operations run the backend ``name``, or the device's own."""
    before = os.environ.pop("NSA_BACKEND", None)
    if name is not None:
        os.environ["NSA_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("NSA_BACKEND", None)
        if before is not None:
            os.environ["NSA_BACKEND"] = before


def _speed(result: TrainResult) -> float | None:
    """Tokens per second of this process, or of one before it that logged more before it stopped."""
    path = result.output_dir / "speed.json"
    # The first holds the start and compilations.
    rates = [rate for _, rate in result.speeds[1:]]
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if len(rates) > len(before):
        write_text(path, json.dumps(rates))
        return statistics.median(rates)
    return statistics.median(before) if before else None


def _measured(config: TrainConfig, result: TrainResult, speed: float | None) -> Row:
    """What a whole run showed: its losses, and how fast it went."""
    run = result.output_dir
    with torch.device("meta"):
        model = NSAForCausalLM(NSAModelConfig.from_pretrained(run / "model"))
    settings = curve_settings(config.to_dict())
    del settings["model.attention"]
    return {
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "settings": settings,
        "steps": result.step,
        "compile": config.training.compile,
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "data": json.loads((run / "data.json").read_text(encoding="utf-8"))["train"],
        "tokens_per_second": speed,
        "losses": result.losses,
    }
