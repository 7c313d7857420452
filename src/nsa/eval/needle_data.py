"""Writes documents that teach a model the needle task, for ``nsa train`` to read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from nsa.eval.haystack import Haystack
from nsa.eval.progress import progress_bar
from nsa.train.documents import find_files, read_documents
from nsa.train.files import replacing
from nsa.train.tokenizer import load_tokenizer


def read_haystack(paths: Sequence[Path], tokenizer: Path, *, name: str) -> Haystack:
    """Reads text to hide needles in.

    Args:
        paths: files or folders, as for training.
        tokenizer: folder of the tokenizer, or of a model that has one.
        name: what the caller calls ``paths``, for messages.

    Raises:
        FileNotFoundError: a path is not there.
        ValueError: no text, or no tokenizer.
    """
    texts = (document.text for document in read_documents(find_files(paths, name=name)))
    return Haystack.from_texts(texts, load_tokenizer(tokenizer))


def write_documents(path: Path, documents: Iterable[str], *, num_documents: int) -> None:
    """Writes texts as JSON lines ``{"text": ...}``; ``path`` is the old file or the whole new one.

    Args:
        path: file to write, ``.jsonl``; its folder is created.
        documents: such as :func:`nsa.eval.needle.training_documents` yields.
        num_documents: how many they are, for the progress bar.

    Raises:
        ValueError: another suffix, which ``nsa train`` would not read.
    """
    if path.suffix != ".jsonl":
        raise ValueError(f"--output: expected a name that ends in .jsonl, got {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as staged,
        staged.open("w", encoding="utf-8") as file,
        progress_bar("Documents", num_documents) as advance,
    ):
        for index, text in enumerate(documents, start=1):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            advance(index)
        file.flush()
        os.fsync(file.fileno())
