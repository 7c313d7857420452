"""The smallest run that still has everything: a corpus, a validation set and an NSA model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from nsa.train.config import TrainConfig

WORDS = ("red", "blue", "green", "the", "a", "cat", "dog", "sees", "runs", "sleeps")


def write_corpus(folder: Path) -> None:
    """``train.jsonl`` and ``valid.jsonl``: sentences of 5 to 120 words, the same everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for name, count in (("train", 40), ("valid", 5)):
        texts = (
            " ".join(WORDS[rng.randrange(len(WORDS))] for _ in range(rng.randint(5, 120)))
            for _ in range(count)
        )
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)


def settings(folder: Path, output_dir: Path, **training: Any) -> dict[str, Any]:
    """A config as nested mappings, over the corpus in ``folder``."""
    return {
        "model": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "compress_block_size": 8,
            "compress_stride": 4,
            "block_size": 8,
            "num_selected_blocks": 4,
            "window_size": 8,
            "max_position_embeddings": 128,
        },
        "data": {
            "train": [str(folder / "train.jsonl")],
            "validation": [str(folder / "valid.jsonl")],
            "seq_len": 48,
        },
        "tokenizer": {"vocab_size": 270},
        "training": {
            "output_dir": str(output_dir),
            "max_steps": 6,
            "batch_rows": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "log_every": 1,
            "save_every": 2,
            "eval_every": 3,
            **training,
        },
    }


def config(folder: Path, output_dir: Path, **training: Any) -> TrainConfig:
    """The same, checked."""
    return TrainConfig.from_dict(settings(folder, output_dir, **training))
