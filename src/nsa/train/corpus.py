"""Token store of a run: every document encoded once, kept on disk, mapped by each process.

Not a cache across runs: it lives in the run's folder and is made anew when a file or the tokenizer
changes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from nsa.train.documents import Document, read_documents
from nsa.train.files import naming, sync_folder, write_text
from nsa.train.tokenizer import encode_documents, start_tokens

# Characters handed to the tokenizer at once: enough for its threads, little enough for any memory.
_BATCH_CHARS = 4_000_000


@dataclass(frozen=True, slots=True)
class Corpus:
    """Encoded documents.

    Args:
        tokens: uint32 ``[num_tokens]``, all documents one after the other.
        offsets: int64 ``[num_documents + 1]``, where each begins, then the total.
        digest: SHA-256 of the tokens and offsets: two corpora with one digest train the same model.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    digest: str

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, start and end tokens included."""
        return int(self.offsets[-1])

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, uint32 ``[length]``."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def build_corpus(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    name: str,
    text_field: str = "text",
    on_tokens: Callable[[int], None] | None = None,
) -> Corpus:
    """Encodes ``files`` into ``folder / name``, or opens what an earlier call left there.

    Args:
        files: data files, see :func:`nsa.train.documents.find_files`.
        tokenizer: encodes them.
        folder: where token stores are kept.
        name: which store, such as ``"train"``.
        text_field: field or column that holds the text.
        on_tokens: called with the number of tokens so far, now and then.

    Returns:
        The corpus, memory-mapped.

    Raises:
        ValueError: the files hold no text, or cannot be read (see :func:`read_documents`).
        OSError: the store cannot be written; the message names the file.
    """
    key = _fingerprint(files, tokenizer, text_field)
    store = folder / name
    corpus = _open(store, key)
    if corpus is None:
        staged = folder / f".{name}.partial"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            documents = read_documents(files, text_field=text_field)
            _encode_into(staged, documents, tokenizer, name=name, key=key, on_tokens=on_tokens)
            sync_folder(staged)
            shutil.rmtree(store, ignore_errors=True)
            staged.rename(store)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        corpus = _open(store, key)
        assert corpus is not None, f"{store} was written"
    return corpus


def _fingerprint(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, text_field: str) -> str:
    parts: list[object] = [text_field, start_tokens(tokenizer), tokenizer.eos_token_id]
    for path in files:
        stat = path.stat()
        parts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    parts.append(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _open(store: Path, key: str) -> Corpus | None:
    """What is in the store; None if it is of something else, or not whole."""
    try:
        meta = json.loads((store / "meta.json").read_text(encoding="utf-8"))
        tokens = np.memmap(store / "tokens.bin", dtype=np.uint32, mode="r")
        corpus = Corpus(tokens, np.load(store / "offsets.npy"), meta["digest"])
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return corpus if meta["key"] == key and len(tokens) == corpus.num_tokens else None


def _encode_into(
    staged: Path,
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    key: str,
    on_tokens: Callable[[int], None] | None,
) -> None:
    digest = hashlib.sha256()
    offsets = [0]
    path = staged / "tokens.bin"
    with naming(path), path.open("wb") as file:
        for texts in _batches(documents):
            for ids in encode_documents(tokenizer, texts):
                raw = np.asarray(ids, dtype=np.uint32).tobytes()
                digest.update(raw)
                file.write(raw)
                offsets.append(offsets[-1] + len(ids))
            if on_tokens is not None:
                on_tokens(offsets[-1])
    if len(offsets) == 1:
        raise ValueError(
            f"data.{name}: expected at least one document with text, found none. "
            f"Check the files of data.{name}."
        )
    positions = np.asarray(offsets, dtype=np.int64)
    digest.update(positions.tobytes())
    # Into a file itself NumPy would write less than all on a full disk, and not say so.
    np.save(buffer := io.BytesIO(), positions)
    path = staged / "offsets.npy"
    with naming(path):
        path.write_bytes(buffer.getvalue())
    write_text(staged / "meta.json", json.dumps({"key": key, "digest": digest.hexdigest()}))


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    num_chars = 0
    for document in documents:
        texts.append(document.text)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS:
            yield texts
            texts, num_chars = [], 0
    if texts:
        yield texts
