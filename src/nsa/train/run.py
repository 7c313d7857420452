"""One training run, from a config to a model on disk.

Not the loop: it prepares tokenizer, rows and model, and hands them to :mod:`nsa.train.engine`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import is_tensorboard_available

from nsa.models import NSAForCausalLM, NSAModelConfig
from nsa.models.saving import write_errors
from nsa.train import checkpoint
from nsa.train.config import TrainConfig
from nsa.train.corpus import Corpus, build_corpus
from nsa.train.documents import find_files, read_documents
from nsa.train.engine import NSATrainer, training_arguments
from nsa.train.files import naming, write_text
from nsa.train.packing import PackedRows, collate, collate_same_shape
from nsa.train.progress import EventFiles, LastingConsole, Milestones, ProgressReport, StopOnSignal
from nsa.train.start import (
    check_initial_tokenizer,
    new_model,
    read_record,
    saved_settings,
    with_initial_model,
)
from nsa.train.tokenizer import load_tokenizer, train_tokenizer
from nsa.train.validation import PositionLosses

# What may differ when a run is resumed: none of it moves the loss curve that was already drawn.
# The text itself is compared by its tokens, wherever the files lie.
_MAY_CHANGE = frozenset(
    {
        "data.train",
        "data.validation",
        "data.text_field",
        "training.output_dir",
        "training.max_steps",
        "training.micro_batch_rows",
        "training.gradient_checkpointing",
        "training.recompute_branches",
        "training.compile",
        "training.log_every",
        "training.save_every",
        "training.keep_checkpoints",
        "training.eval_every",
        "training.num_workers",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a run leaves behind.

    Args:
        output_dir: folder of the run.
        model_dir: the final model; None if the run was stopped before the end.
        step: optimizer steps done.
        losses: step and mean training loss (nats per token) since the step before it in the list.
        speeds: step and tokens per second since the step before it, of this process alone.
        validation_losses: step and validation loss.
        validation: the last validation loss by position; None without validation documents.
        signal_number: the signal that stopped the run, or None.
    """

    output_dir: Path
    model_dir: Path | None
    step: int
    losses: list[tuple[int, float]]
    speeds: list[tuple[int, float]]
    validation_losses: list[tuple[int, float]]
    validation: PositionLosses | None
    signal_number: int | None


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    show_config: bool = True,
) -> TrainResult:
    """Runs, or goes on with, the training that ``config`` describes.

    The same config and data give the same losses, bit for bit on one kind of machine, whether the
    run was killed and resumed or not. Under torchrun every process calls this; the batch is dealt
    out, so the losses are those of one process up to rounding.

    Args:
        config: the run.
        resume: go on from the newest whole checkpoint in ``output_dir``, from the start if there is
            none. Without it, a folder that holds a run is an error.
        console: where progress is shown.
        show_config: print the resolved config before the first step; it is saved in any case.

    Returns:
        Losses and where the model is.

    Raises:
        ValueError: settings or data do not fit, a file of the run is damaged, or the training
            diverged; see the message.
        FileNotFoundError: a data file is not there.
        CheckpointError: a checkpoint could not be written.

    Example:
        >>> train(load_config("configs/tiny-cpu.yaml")).model_dir
        PosixPath('runs/tiny-cpu/model')
    """
    run_dir = Path(config.training.output_dir)
    for path in (run_dir, *run_dir.parents):
        if path.is_file():
            raise ValueError(
                f"training.output_dir: expected a folder, or where one can be made, got {run_dir}, "
                f"but {path} is a file. Choose another."
            )
    start, passed_over = checkpoint.latest_checkpoint(run_dir)
    if not resume and checkpoint.list_checkpoints(run_dir):
        raise ValueError(
            f"training.output_dir: {run_dir} already holds a run. Go on with --resume, or choose "
            "another folder."
        )
    if start is None and passed_over:
        raise ValueError(
            f"training.output_dir: expected a whole checkpoint in {run_dir} to go on from, found "
            f"none: {' '.join(passed_over)} Copy them again, or choose another folder."
        )
    if start is None and (run_dir / "model").exists():
        raise ValueError(
            f"training.output_dir: {run_dir} holds a model, which this run would replace, and no "
            "checkpoint to go on from. Choose another folder."
        )
    args = training_arguments(config.training)
    console = console or LastingConsole(highlight=False)
    if args.process_index:
        console = Console(quiet=True)
    for line in passed_over:
        console.print(line, style="yellow", markup=False)
    config = with_initial_model(config, run_dir, resuming=start is not None)
    # Before minutes of reading text; how many tokens there are is not known yet.
    NSAModelConfig(**{**config.model, "pad_token_id": None})
    with args.main_process_first(local=False):
        config, tokenizer, corpora = _prepare(
            config, run_dir, start=start, leads=args.process_index == 0, console=console
        )
    set_seed(config.training.seed)
    model = new_model(config, resuming=start is not None)
    rows = PackedRows(
        corpora["train"],
        seq_len=config.data.seq_len,
        num_rows=config.training.max_steps * config.training.batch_rows,
        seed=config.training.seed,
    )
    if show_config:
        console.print(config.to_yaml(), markup=False)
    _describe(config, corpora, rows, model, tokenizer, console)
    if args.process_index == 0:
        write_text(run_dir / "config.yaml", config.to_yaml())
    return _run(config, args, model, tokenizer, corpora, rows, start=start, console=console)


def _run(
    config: TrainConfig,
    args: TrainingArguments,
    model: NSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    corpora: Mapping[str, Corpus],
    rows: PackedRows,
    *,
    start: Path | None,
    console: Console,
) -> TrainResult:
    loop = config.training
    per_step = loop.batch_rows
    progress = ProgressReport(console, lambda i: rows.num_tokens(i * per_step, (i + 1) * per_step))
    stop = StopOnSignal(console)
    held_out = _documents(corpora.get("validation"))
    milestones = Milestones(
        log_every=loop.log_every,
        save_every=loop.save_every,
        eval_every=loop.eval_every,
        validates=bool(held_out),
    )
    same_shape = partial(collate_same_shape, seq_len=config.data.seq_len)
    trainer = NSATrainer(
        run_dir=Path(loop.output_dir),
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=same_shape if loop.compile else collate,
        processing_class=tokenizer,
        callbacks=[milestones, stop, progress, *_tensorboard(Path(loop.output_dir), console)],
        validation_documents=held_out,
        validation_max_tokens=config.data.validation_max_tokens or 0,
        keep_checkpoints=loop.keep_checkpoints,
    )
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"training: expected a step to fit into the memory of the device, but {error} Lower "
            "training.micro_batch_rows, or set training.recompute_branches, which saves some of "
            "it, or training.gradient_checkpointing, which saves most; all three may change when "
            "the run is resumed."
        ) from error
    finally:
        progress.close()
    return _finish(trainer, stop, progress, console)


def _finish(
    trainer: NSATrainer, stop: StopOnSignal, progress: ProgressReport, console: Console
) -> TrainResult:
    run_dir = trainer.run_dir
    state = trainer.state
    finished = state.global_step >= state.max_steps
    model_dir = trainer.save_final_model() if finished else None
    if trainer.args.should_save:
        write_text(run_dir / "history.json", json.dumps(state.log_history, indent=1))
    if model_dir:
        console.print(f"Done. Model: {model_dir}", markup=False)
    else:
        saved = run_dir / f"checkpoint-{state.global_step}"
        console.print(f"Stopped. Saved {saved}.", markup=False)
    return TrainResult(
        output_dir=run_dir,
        model_dir=model_dir,
        step=state.global_step,
        losses=[(int(e["step"]), e["loss"]) for e in state.log_history if "loss" in e],
        speeds=progress.speeds,
        validation_losses=[
            (int(e["step"]), e["eval_loss"]) for e in state.log_history if "eval_loss" in e
        ],
        validation=trainer.validation,
        signal_number=None if finished else stop.signal_number,
    )


def _prepare(
    config: TrainConfig, run_dir: Path, *, start: Path | None, leads: bool, console: Console
) -> tuple[TrainConfig, PreTrainedTokenizerBase, dict[str, Corpus]]:
    """Tokenizer and token stores of the run, and the config with what follows from them.

    The first process leads; the others come after it and find its work on disk.
    """
    files = {"train": find_files(config.data.train, name="data.train")}
    if config.data.validation:
        files["validation"] = find_files(config.data.validation, name="data.validation")
    tokenizer_dir = run_dir / "tokenizer"
    if start or not leads:
        tokenizer = load_tokenizer(start or tokenizer_dir)
    elif config.tokenizer.load:
        tokenizer = load_tokenizer(config.tokenizer.load)
    else:
        texts = (d.text for d in read_documents(files["train"], text_field=config.data.text_field))
        with console.status("tokenizer: learning from the text"):
            tokenizer = train_tokenizer(texts, vocab_size=config.tokenizer.vocab_size or 0)
    config = _resolve(config, tokenizer)
    if start:
        _check_same_settings(config, run_dir)
    else:
        check_initial_tokenizer(config, tokenizer)
    corpora = {
        name: _encode(paths, tokenizer, run_dir, name, config.data.text_field, console)
        for name, paths in files.items()
    }
    _check_held_out(corpora.get("validation"))
    digests = {name: corpus.digest for name, corpus in corpora.items()}
    if start:
        _check_same_data(digests, run_dir)
    elif leads:
        with naming(tokenizer_dir), write_errors():
            tokenizer.save_pretrained(tokenizer_dir)
        write_text(run_dir / "data.json", json.dumps(digests, indent=1))
    return config, tokenizer, corpora


def _encode(
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path,
    name: str,
    text_field: str,
    console: Console,
) -> Corpus:
    """The token store ``name``, which a terminal sees grow: it may take minutes."""
    with console.status(f"{name}: reading text") as status:
        return build_corpus(
            files,
            tokenizer,
            run_dir / "tokens",
            name=name,
            text_field=text_field,
            on_tokens=lambda num: status.update(f"{name}: {num:,} tokens read"),
        )


def _resolve(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainConfig:
    """Fills in the settings that follow from the tokenizer and the lengths, and checks them."""
    data = config.data
    longest = max(data.seq_len, data.validation_max_tokens or 0)
    model: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": longest,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config.model,
    }
    if model["vocab_size"] < len(tokenizer):
        raise ValueError(
            f"model.vocab_size: expected at least the tokenizer's {len(tokenizer)} tokens, "
            f"got {model['vocab_size']}. Leave it out to take the tokenizer's."
        )
    for name, value in (
        ("seq_len", data.seq_len),
        ("validation_max_tokens", data.validation_max_tokens or 0),
    ):
        if value > model["max_position_embeddings"]:
            raise ValueError(
                f"data.{name}: expected at most model.max_position_embeddings = "
                f"{model['max_position_embeddings']}, got {value}."
            )
    NSAModelConfig(**model)
    read = data.validation_max_tokens or model["max_position_embeddings"]
    if data.validation:
        data = replace(data, validation_max_tokens=read)
    return replace(config, model=model, data=data)


def _check_same_settings(config: TrainConfig, run_dir: Path) -> None:
    saved = saved_settings(run_dir)
    before, now = curve_settings(saved), curve_settings(config.to_dict())
    # Without held-out text no curve depends on how it is read.
    free = () if _flat(saved).get("data.validation") else ("data.validation_max_tokens",)
    changed = [
        f"{key} (was {before.get(key)!r}, is {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if key not in free and before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{run_dir}: the run in it was made with other settings: {', '.join(changed)}. "
            "Set them back, or choose another folder."
        )


def curve_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of :meth:`TrainConfig.to_dict` that move the loss curve, by ``section.key``."""
    return {key: value for key, value in _flat(values).items() if key not in _MAY_CHANGE}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, settings in values.items()
        for key, value in settings.items()
    }


def _check_same_data(digests: Mapping[str, str], run_dir: Path) -> None:
    before = read_record(run_dir / "data.json", json.loads)
    changed = [f"data.{name}" for name in before if digests.get(name) != before[name]]
    if changed:
        raise ValueError(
            f"{run_dir}: the text of {', '.join(changed)} is not what the run in it began with. "
            "Put the files back, or choose another folder."
        )


def _check_held_out(corpus: Corpus | None) -> None:
    if corpus is not None and int(np.diff(corpus.offsets).max()) < 2:
        raise ValueError(
            "data.validation: expected documents of at least 2 tokens, found none. Check the files."
        )


def _documents(corpus: Corpus | None) -> list[np.ndarray]:
    """Held-out documents that predict something."""
    if corpus is None:
        return []
    documents = (corpus.document(index) for index in range(corpus.num_documents))
    return [document for document in documents if len(document) > 1]


def _tensorboard(run_dir: Path, console: Console) -> list[TrainerCallback]:
    if not is_tensorboard_available():
        console.print(
            "tensorboard is not installed, so this run writes no event files: "
            'pip install "native-sparse-attention[train]"',
            markup=False,
        )
        return []
    return [EventFiles(run_dir / "tensorboard", console)]


def _describe(
    config: TrainConfig,
    corpora: Mapping[str, Corpus],
    rows: PackedRows,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> None:
    asked = config.tokenizer.vocab_size or 0
    if len(tokenizer) < asked:
        console.print(
            f"tokenizer: {len(tokenizer):,} of {asked:,} tokens; the text gives no more",
            markup=False,
        )
    for name, corpus in corpora.items():
        console.print(
            f"{name}: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens",
            markup=False,
        )
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"model: {parameters:,} parameters; {len(rows):,} rows of {config.data.seq_len:,} tokens, "
        f"{len(rows) / rows.rows_per_epoch:.2f} epochs",
        markup=False,
    )
