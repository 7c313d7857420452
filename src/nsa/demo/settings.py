"""What the demo trains: two small models that differ in one setting, and the book they read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from nsa.config import NSAConfig
from nsa.train.config import TrainConfig
from nsa.train.files import write_text

TWINS = ("nsa", "dense")
BOOK_TITLE = "Moby-Dick, by Herman Melville (1851)"
# The last three chapters and the epilogue, 5.5 % of the book, are never trained on.
HELD_OUT_FROM = "\nCHAPTER 133."


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Sizes of the demo, chosen so that both trainings take about four minutes on two cores.

    Args:
        geometry: block sizes and counts of the sparse model.
        vocab_size: tokens of the byte-level BPE trained on the book.
        seq_len: tokens a model sees at once.
        hidden_size: width of both models.
        num_layers: blocks of both models.
        num_heads: query heads.
        num_kv_heads: kv heads.
        max_steps: optimizer steps.
        batch_rows: sequences per step.
        eval_every: steps between validation losses.
        learning_rate: peak learning rate.
        train_chars: how much of the book is trained on, from its start; all but the held-out part
            if None.
        held_out_chars: how much of the held-out part is read; all if None.
        sample_tokens: tokens of each sample.
        min_gain: nats by which the sparse model's held-out loss must end under the unigram entropy,
            so that the demo shows a model that learned; anything passes if None.
    """

    geometry: NSAConfig = field(default_factory=NSAConfig.tiny)
    vocab_size: int = 1024
    seq_len: int = 512
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    max_steps: int = 420
    batch_rows: int = 2
    eval_every: int = 105
    learning_rate: float = 4e-3
    train_chars: int | None = None
    held_out_chars: int | None = None
    sample_tokens: int = 160
    min_gain: float | None = 1.0

    def train_config(self, attention: str, folder: Path) -> TrainConfig:
        """The run of one twin in ``folder / attention``; both have the same data and seed."""
        model: dict[str, Any] = {
            "attention": attention,
            "hidden_size": self.hidden_size,
            "intermediate_size": 3 * self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "tie_word_embeddings": True,
            **asdict(self.geometry),
        }
        # The first run trains the tokenizer, the second one reads with the same.
        tokenizer = (
            {"vocab_size": self.vocab_size}
            if attention == TWINS[0]
            else {"load": str(folder / TWINS[0] / "tokenizer")}
        )
        return TrainConfig.from_dict(
            {
                "model": model,
                "data": {
                    "train": [str(folder / "data" / "train.txt")],
                    "validation": [str(folder / "data" / "validation.jsonl")],
                    "seq_len": self.seq_len,
                },
                "tokenizer": tokenizer,
                "training": {
                    "output_dir": str(folder / attention),
                    "max_steps": self.max_steps,
                    "batch_rows": self.batch_rows,
                    "micro_batch_rows": self.batch_rows,
                    "learning_rate": self.learning_rate,
                    "warmup_steps": min(20, self.max_steps // 4),
                    "log_every": max(1, self.max_steps // 60),
                    "save_every": max(1, self.max_steps // 4),
                    "keep_checkpoints": 1,
                    "eval_every": self.eval_every,
                },
            }
        )


def read_book() -> tuple[str, str]:
    """The bundled book: what is trained on, and what is held out."""
    book = (files("nsa.demo") / "book" / "moby_dick.txt").read_text(encoding="utf-8")
    cut = book.index(HELD_OUT_FROM) + 1
    return book[:cut], book[cut:]


def write_data(folder: Path, settings: DemoSettings) -> None:
    """Writes the text files of both runs, unless they are there.

    The held-out part is cut at paragraph ends into documents that fill a sequence.
    """
    trained, _ = read_book()
    contents = {
        "train.txt": trained[: settings.train_chars],
        "validation.jsonl": "".join(
            json.dumps({"text": passage}) + "\n" for passage in held_out_passages(settings)
        ),
    }
    for name, content in contents.items():
        path = folder / "data" / name
        # A run goes on only with the very files it began with, so they are not touched again.
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            write_text(path, content)


def held_out_passages(settings: DemoSettings) -> list[str]:
    """The documents that both models are evaluated on."""
    _, held_out = read_book()
    return passages(held_out[: settings.held_out_chars], settings.seq_len)


def passages(text: str, seq_len: int) -> list[str]:
    """Whole paragraphs joined until they fill ``seq_len`` tokens, at three characters a token."""
    found: list[str] = []
    for paragraph in text.split("\n\n"):
        if found and len(found[-1]) < 3 * seq_len:
            found[-1] += "\n\n" + paragraph
        else:
            found.append(paragraph)
    return [passage for passage in found if passage.strip()]
