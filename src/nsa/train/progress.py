"""What a person sees of a running loop, and how they stop it.

Not a logger: TensorBoard and ``trainer_state.json`` keep the numbers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

# Before the positions of a bin, in the name of its validation loss.
_LOSS_AT = "eval_loss_at/"


class LastingConsole(Console):
    """A console of work that is worth more than its output, which goes on when nobody reads it.

    Ctrl-C ends ``tee`` before it stops ``nsa train | tee log``, whose checkpoint is yet to come.
    """

    def on_broken_pipe(self) -> None:
        """Says so where someone may still read, and writes to the null device from now on."""
        with suppress(SystemExit):
            super().on_broken_pipe()
        try:
            print("Nobody reads the output any more. The run goes on without it.", file=sys.stderr)
        except BrokenPipeError:  # after 2>&1; bars of transformers would fail there too
            os.dup2(sys.stdout.fileno(), sys.stderr.fileno())


class ProgressReport(TrainerCallback):
    """A progress bar with loss and tokens per second on a terminal, plain lines elsewhere.

    Args:
        console: where to write; only the first process does.
        tokens_in_step: tokens that optimizer step ``i`` (from 0) reads, over all devices.

    ``speeds`` are the tokens per second that it showed, and at which step.
    """

    def __init__(self, console: Console, tokens_in_step: Callable[[int], int]) -> None:
        self.console = console
        self.tokens_in_step = tokens_in_step
        self.speeds: list[tuple[int, float]] = []
        self._bar: Progress | None = None
        self._since = 0.0
        self._tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock, and the bar on a terminal."""
        self._restart_clock()
        if state.is_world_process_zero and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.add_task("", total=state.max_steps, completed=state.global_step, note="")
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts the step."""
        self._tokens += self.tokens_in_step(state.global_step - 1)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows a training or a validation loss, by position that of the last step."""
        if not state.is_world_process_zero or logs is None:
            return
        at = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            self.console.print(
                f"{at}  validation loss {logs['eval_loss']:.4f}  ({logs['eval_tokens']:,} tokens)"
            )
            if state.global_step >= state.max_steps:
                bins = (
                    f"{key.removeprefix(_LOSS_AT)} {loss:.4f}"
                    for key, loss in logs.items()
                    if key.startswith(_LOSS_AT)
                )
                self.console.print(f"validation loss at positions {',  '.join(bins)}")
            self._restart_clock()
        elif "loss" in logs:
            rate = self._tokens / max(time.monotonic() - self._since, 1e-9)
            self.speeds.append((state.global_step, rate))
            note = f"loss {logs['loss']:.4f}  {rate:,.0f} tokens/s"
            if self._bar is None:
                self.console.print(f"{at}  {note}  learning rate {logs['learning_rate']:.2e}")
            else:
                self._bar.update(self._bar.task_ids[0], note=note)
            self._restart_clock()

    def close(self) -> None:
        """Takes the bar off the screen, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _restart_clock(self) -> None:
        self._since, self._tokens = time.monotonic(), 0


class StopOnSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, when a signal asks for it.

    Ctrl-C and SIGTERM (schedulers, torchrun) ask; a second Ctrl-C does not wait for the step.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.signal_number: int | None = None
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes over the two signals, in the main thread, and gives them back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops all processes at the same step, whichever of them got the signal."""
        asked = self.signal_number or 0
        if dist.is_available() and dist.is_initialized():
            shared = torch.tensor(asked, device=args.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            asked = int(shared)
        if asked:
            self.signal_number = asked
            control.should_log = control.should_save = control.should_training_stop = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        if os.getpid() == self._process:  # workers that prepare batches inherit the handler
            self.console.print("Stopping after this step; Ctrl-C again stops at once.")


class EventFiles(TensorBoardCallback):
    """TensorBoard's event files, which a run can do without: a write that fails ends them alone.

    Args:
        folder: where they go.
        console: told once that there will be no more.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        super().__init__()
        self.logging_dir = str(folder)
        self.console = console
        self._failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens a file and writes settings."""
        with self._optional():
            super().on_train_begin(args, state, control, **kwargs)
            if self.tb_writer is not None:
                self.tb_writer.flush()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes losses and waits until they are in the file."""
        if not self._failed:
            with self._optional():
                super().on_log(args, state, control, logs, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the file."""
        if not self._failed:
            with self._optional():
                super().on_train_end(args, state, control, **kwargs)

    @contextmanager
    def _optional(self) -> Iterator[None]:
        shown = threading.excepthook
        # The thread that writes hands its error over, then shows it as well.
        threading.excepthook = lambda args: None if _writes_events(args.thread) else shown(args)
        try:
            yield
        except OSError as error:
            self._failed = True
            for thread in filter(_writes_events, threading.enumerate()):
                thread.join(timeout=0.2)
            self.console.print(
                f"{self.logging_dir}: no further event files for TensorBoard ({error}). "
                "The run goes on.",
                style="yellow",
                markup=False,
            )
        finally:
            threading.excepthook = shown


def _writes_events(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")


class Milestones(TrainerCallback):
    """Decides at which steps the loop logs, saves and evaluates, also in a resumed run.

    A checkpoint always comes with a logged loss, so that the losses of a run that was killed are
    averaged over the same steps as those of one that was not.
    """

    def __init__(
        self, *, log_every: int, save_every: int, eval_every: int, validates: bool
    ) -> None:
        self.log_every = log_every
        self.save_every = save_every
        self.eval_every = eval_every
        self.validates = validates

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the flags that the Trainer acts on."""
        step, last = state.global_step, state.global_step >= state.max_steps
        due = [bool(every) and step % every == 0 for every in (self.save_every, self.eval_every)]
        control.should_save = due[0] or last
        control.should_evaluate = self.validates and (due[1] or last)
        control.should_log = control.should_save or step == 1 or step % self.log_every == 0
        control.should_training_stop = control.should_training_stop or last
