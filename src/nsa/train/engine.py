"""transformers' Trainer with whole-or-absent checkpoints and a validation loss by position.

Not a training loop: the loop, DDP, FSDP2, mixed precision and the optimizer are Trainer's.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from nsa.models.saving import write_errors
from nsa.train import checkpoint
from nsa.train.config import LoopConfig
from nsa.train.validation import PositionLosses, consecutive_pieces, position_losses

CUDA_GRAPHS = "reduce-overhead"  # As a mode of torch.compile.


def training_arguments(loop: LoopConfig) -> TrainingArguments:
    """Translates a ``training`` section; under torchrun this joins the process group.

    Raises:
        ValueError: the batch cannot be dealt out over the devices, or FSDP is asked for with one.
    """
    on_gpu = torch.cuda.is_available()
    # Trainer renamed the setting in 5.2x; the old name warns there.
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    recompute = next(
        n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names
    )
    renamed: dict[str, Any] = {recompute: loop.gradient_checkpointing}
    schedule = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": loop.min_lr_ratio}),
        "wsd": (
            "warmup_stable_decay",
            {"num_decay_steps": loop.decay_steps, "min_lr_ratio": loop.min_lr_ratio},
        ),
    }[loop.schedule]
    args = TrainingArguments(
        output_dir=loop.output_dir,
        max_steps=loop.max_steps,
        per_device_train_batch_size=loop.micro_batch_rows,
        learning_rate=loop.learning_rate,
        lr_scheduler_type=schedule[0],
        lr_scheduler_kwargs=schedule[1],
        warmup_steps=loop.warmup_steps,
        weight_decay=loop.weight_decay,
        adam_beta1=loop.beta1,
        adam_beta2=loop.beta2,
        max_grad_norm=loop.max_grad_norm,
        bf16=loop.precision == "bf16" or (loop.precision == "auto" and on_gpu),
        # Trainer turns TF32 on for what it compiles.
        tf32=False if loop.precision == "fp32" else None,
        torch_compile=loop.compile,
        seed=loop.seed,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        fsdp=True if loop.fsdp else None,  # pyright: ignore[reportArgumentType]
        fsdp_config={"version": 2, "state_dict_type": "FULL_STATE_DICT"} if loop.fsdp else None,
        dataloader_num_workers=loop.num_workers,
        dataloader_pin_memory=on_gpu,
        # Rows come in the order of the run already, see nsa.train.packing.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        # The Milestones callback decides; a NaN must be seen, not averaged away.
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        **renamed,
    )
    if loop.fsdp and args.world_size == 1:
        raise ValueError(
            "training.fsdp: expected several processes, got one. Start them with torchrun, such as "
            "torchrun --nproc-per-node 2 --no-python nsa train CONFIG."
        )
    args.gradient_accumulation_steps = loop.accumulation_steps(args.world_size)
    if loop.compile and on_gpu and args.world_size == 1:
        args.torch_compile_mode = CUDA_GRAPHS
    # One process with several GPUs would scatter cu_seqlens over them (DataParallel); it uses one.
    args._n_gpu = min(args.n_gpu, 1)
    return args


class NSATrainer(Trainer):
    """Trainer for packed rows.

    Args:
        run_dir: folder of the run.
        validation_documents: token ids of held-out documents; empty for none.
        validation_max_tokens: tokens of each that are read at once.
        keep_checkpoints: checkpoints kept.
        kwargs: Trainer's own.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        validation_documents: Sequence[np.ndarray] = (),
        validation_max_tokens: int = 0,
        keep_checkpoints: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)
        self.validation_documents = validation_documents
        self.validation_max_tokens = validation_max_tokens
        self.keep_checkpoints = keep_checkpoints
        self.validation: PositionLosses | None = None
        self.run_dir = run_dir
        self._output_dir = run_dir

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's own, and FSDP2 on CPUs, where accelerate 1.15 drops the plug-in for DDP."""
        super().create_accelerator_and_postprocess()
        compilation = self.accelerator.state.dynamo_plugin
        if compilation is not None:
            # Batches have one shape (see ``nsa.train.packing``); graphs of any would be slower.
            compilation.dynamic = False
        if self.args.fsdp and not self.is_fsdp_enabled:
            state = self.accelerator.state
            settings: dict[str, Any] = self.args.fsdp_plugin_args or {}
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type = DistributedType.FSDP
            PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's own, with gradients that the next rows of a step may be added to.

        Those of a CUDA graph lie in its memory, which its next run overwrites.
        """
        in_graphs = self.args.torch_compile_mode == CUDA_GRAPHS
        if in_graphs and self.args.gradient_accumulation_steps > 1:
            for weight in model.parameters():
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
        return super().training_step(model, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: object = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss on whole held-out documents, in all and by position.

        One that is longer than ``validation_max_tokens`` is read in consecutive pieces, each a
        sequence of its own; positions are counted from the start of the piece.

        Returns:
            ``eval_loss``, ``eval_tokens`` and ``eval_loss_at/<first>-<last>`` for every bin.
        """
        documents, max_len = self.validation_documents, self.validation_max_tokens
        with self.accelerator.autocast():
            result = position_losses(
                self.model,  # pyright: ignore[reportArgumentType]
                consecutive_pieces(documents, max_len),
                max_len=max_len,
            )
        self.validation = dataclasses.replace(result, num_documents=len(documents))
        edges = result.bin_edges
        metrics = {f"{metric_key_prefix}_loss": result.loss}
        metrics[f"{metric_key_prefix}_tokens"] = result.num_tokens
        for first, last, loss in zip(edges[:-1], edges[1:], result.bin_losses, strict=True):
            if not math.isnan(loss):
                metrics[f"{metric_key_prefix}_loss_at/{first}-{last - 1}"] = loss
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, and ends a run whose loss is no longer a number; what is saved stays as it was.

        Raises:
            ValueError: the loss of training or validation is not finite.
        """
        for key, name in (("loss", "the loss"), ("eval_loss", "the validation loss")):
            if not math.isfinite(logs.get(key, 0.0)):
                raise self._diverged(f"{name} at step {self.state.global_step} is {logs[key]}")
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves weights, config and tokenizer, for generation with a cache."""
        config: Any = self.model.config  # pyright: ignore[reportOptionalMemberAccess]
        in_training, config.use_cache = config.use_cache, True
        showed_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            config.use_cache = in_training
            if showed_bars:
                logging.enable_progress_bar()

    def save_final_model(self) -> Path:
        """Publishes the weights as ``<output_dir>/model``, ready for ``from_pretrained``."""
        staged = self._fresh_staging() / "model"
        with self._publishing(staged):
            self.save_model(str(staged), _internal_call=True)
        return self.run_dir / staged.name

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._output_dir = self._fresh_staging()
        staged = self._output_dir / f"checkpoint-{self.state.global_step}"
        try:
            with self._publishing(staged):
                super()._save_checkpoint(model, trial)
        finally:
            self._output_dir = self.run_dir
        if self.args.should_save:
            checkpoint.rotate(self.run_dir, self.keep_checkpoints)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._has_finite_weights():
            return
        folder = Path(resume_from_checkpoint)
        saved = [path for _, path in checkpoint.list_checkpoints(self.run_dir)]
        older = saved[: saved.index(folder)]
        remedy = f"Delete it to go on from {older[-1]}." if older else "Start in another folder."
        raise ValueError(
            f"{folder}: expected finite weights, found NaN, infinity or values too large to "
            f"compute with. The training that saved them diverged. {remedy}"
        )

    def _has_finite_weights(self) -> bool:
        """Whether the weights of all processes are numbers that can be squared and summed."""
        weights = [
            weight.to_local() if isinstance(weight, DTensor) else weight
            for weight in self.model.parameters()  # pyright: ignore[reportOptionalMemberAccess]
        ]
        with torch.no_grad():
            finite = nn.utils.get_total_norm(weights).isfinite().int()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def _diverged(self, what: str) -> ValueError:
        kept, _ = checkpoint.latest_checkpoint(self.run_dir)
        again = (
            "start again in another folder from the last good checkpoint: "
            f"training.initial_model={kept}"
            if kept
            else "start again"
        )
        return ValueError(
            f"training diverged: {what}. Lower training.learning_rate or raise "
            f"training.warmup_steps, and {again}."
        )

    def _fresh_staging(self) -> Path:
        """An empty folder to write weights to; there is none for weights that are of no use."""
        if not self._has_finite_weights():
            raise self._diverged(
                f"weights at step {self.state.global_step} are NaN, infinite or too large to "
                "compute with, and are not saved"
            )
        staging = self.run_dir / checkpoint.STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        return staging

    @contextmanager
    def _publishing(self, staged: Path) -> Iterator[None]:
        """Publishes the folder that the block writes, or leaves nothing of it."""
        try:
            with write_errors():
                yield
                # Every process has files in it: random states, shards.
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoint.publish(staged, self.run_dir)
                    staged.parent.rmdir()
                self.accelerator.wait_for_everyone()
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise checkpoint.save_error(
                error, step=self.state.global_step, run_dir=self.run_dir
            ) from error
