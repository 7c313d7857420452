"""Text in, text out, one sequence at a time: load a model, stream a continuation, converse."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from nsa.models import load_model

DEFAULT_NEW_TOKENS = 200

OnText = Callable[[str], None]


class Generation(NamedTuple):
    """What one call made: the text, and how long the prompt and the answer took together."""

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    seconds: float

    def summary(self) -> str:
        """One line for people, for example ``12 + 200 tokens in 3.1 s (64.5 tokens/s)``."""
        rate = self.num_new_tokens / max(self.seconds, 1e-9)
        return (
            f"{self.num_prompt_tokens} + {self.num_new_tokens} tokens in {self.seconds:.1f} s "
            f"({rate:.1f} tokens/s)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextModel:
    """A causal language model and its tokenizer, both as transformers has them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def stream(
        self,
        prompt: str | list[int],
        *,
        on_text: OnText,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> Generation:
        """Continues ``prompt`` and calls ``on_text`` with each word as soon as it is complete.

        Args:
            prompt: text, or token ids.
            on_text: receives the pieces of the continuation in order.
            max_new_tokens: tokens to make at most; if None, 200 or what the positions leave.
            temperature: 0 takes the likeliest token every time.
            top_p: mass of the likeliest tokens to sample from; without effect at temperature 0.
            seed: makes sampling repeatable; seeds the global generators of torch and numpy.

        Returns:
            The whole continuation, token counts and seconds.

        Raises:
            ValueError: the prompt is empty or not UTF-8, or prompt and answer do not fit the
                model's positions.
        """
        ids = self._ids(prompt)
        limit = self._num_new_tokens(len(ids), max_new_tokens)
        if seed is not None:
            set_seed(seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        streamer = _Streamer(self.tokenizer, on_text)
        input_ids = torch.tensor([ids], device=self.model.device)
        start = time.perf_counter()
        output = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=limit,
            pad_token_id=self._pad_token_id(),
            streamer=streamer,
            **sampling,
        )
        seconds = time.perf_counter() - start
        num_new_tokens = output.shape[1] - len(ids)
        return Generation("".join(streamer.pieces), len(ids), num_new_tokens, seconds)

    def room(self, prompt: str | list[int], max_new_tokens: int | None = None) -> int:
        """Tokens that ``stream`` makes at most of these arguments; 0 if it refuses them."""
        try:
            return self._num_new_tokens(len(self._ids(prompt)), max_new_tokens)
        except ValueError:
            return 0

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        check_text(prompt)
        ids: Any = self.tokenizer(prompt, verbose=False)["input_ids"]
        return ids

    def _num_new_tokens(self, num_prompt_tokens: int, max_new_tokens: int | None) -> int:
        if num_prompt_tokens == 0:
            raise ValueError("prompt: expected at least one token, got an empty text.")
        positions = self.model.config.max_position_embeddings
        room = positions - num_prompt_tokens
        if room < (max_new_tokens or 1):
            raise ValueError(
                f"prompt: {num_prompt_tokens} tokens and {max_new_tokens or 1} new ones need more "
                f"than the model's max_position_embeddings = {positions}. Shorten the prompt or "
                "ask for fewer tokens."
            )
        return min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens

    def _pad_token_id(self) -> int:
        """Never used with one sequence, but transformers warns when there is none."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0


@dataclass(kw_only=True, slots=True)
class Chat:
    """A conversation: with roles if there is a chat template, else one growing transcript.

    Args:
        loaded: the model.
        messages: what was said and is still read, by "user" and "assistant" in turn.
        num_forgotten: oldest turns (a message and its answer) that no longer fit the model.
    """

    loaded: TextModel
    messages: list[dict[str, str]] = field(default_factory=list)
    num_forgotten: int = 0

    def introduction(self) -> str:
        """How the model will see what is typed."""
        if self.loaded.tokenizer.chat_template:
            return "Type a message; an empty line ends the conversation."
        return (
            "This model's tokenizer has no chat template, so it was not trained to converse: it "
            "continues the text you type. An empty line ends it."
        )

    def reply(
        self, message: str, *, on_text: OnText, max_new_tokens: int | None = None, **sampling: Any
    ) -> Generation:
        """Answers ``message`` in the light of the earlier ones; see ``TextModel.stream``.

        The oldest turns are forgotten where they leave the answer less than half the room that it
        has without them. A message that fails (too long alone, say) leaves the conversation as it
        was.
        """
        check_text(message)
        messages = [*self.messages, {"role": "user", "content": message}]
        alone = self.loaded.room(self._prompt(messages[-1:]), max_new_tokens)
        while len(messages) > 1:
            room = self.loaded.room(self._prompt(messages), max_new_tokens)
            if room > 0 and 2 * room >= alone:
                break
            messages = messages[2:]
        made = self.loaded.stream(
            self._prompt(messages), on_text=on_text, max_new_tokens=max_new_tokens, **sampling
        )
        self.num_forgotten += (len(self.messages) + 1 - len(messages)) // 2
        self.messages = [*messages, {"role": "assistant", "content": made.text}]
        return made

    def _prompt(self, messages: list[dict[str, str]]) -> str | list[int]:
        tokenizer = self.loaded.tokenizer
        if not tokenizer.chat_template:
            return "".join(f"{message['content']}\n" for message in messages)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template has written the special tokens already.
        return tokenizer(str(prompt), add_special_tokens=False, verbose=False).input_ids


def load(path: str | Path, *, device: torch.device) -> TextModel:
    """Loads a model folder onto a device, ready to generate.

    Raises:
        ValueError: the folder holds no valid model; the message says what is wrong with it.
    """
    model, tokenizer = load_model(path)
    torch.nn.Module.to(model, device)
    return TextModel(model=model.eval(), tokenizer=tokenizer)


def read_prompt(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, byte {error.start} is not.") from error


def check_text(prompt: str) -> None:
    """Refuses what stands for bytes of a command line or of standard input that are not UTF-8.

    Raises:
        ValueError: the text has such a character.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt: expected UTF-8 text, got {prompt[error.start]!r} at character {error.start}."
        ) from error


class _Streamer(TextStreamer):
    """Hands finished words to a function instead of standard output."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers for each piece; the last one may be empty."""
        if text:
            self.pieces.append(text)
            self._on_text(text)
