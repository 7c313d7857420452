"""Reading text: .txt, .parquet and .jsonl, plain or compressed, one document at a time.

Not a data set library: no schema, no shuffling, no network. Every error names the file and, where
there are lines, the line.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nsa.train.files import naming

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet", ".txt")

_CHUNK_BYTES = 1 << 20


class Document(NamedTuple):
    """One text and where it came from (``file``, or ``file:line`` counted from 1)."""

    source: str
    text: str


def find_files(paths: Sequence[str | Path], *, name: str = "paths") -> list[Path]:
    """Lists the data files that ``paths`` stand for.

    Args:
        paths: files, or folders that are searched recursively for files with a known suffix. Hidden
            names are skipped.
        name: what the caller calls ``paths``, for messages.

    Returns:
        The files: arguments in the given order, the content of a folder sorted by path.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing was given, a file has an unknown suffix, or a folder holds no data file.
    """
    if isinstance(paths, str | Path) or not paths:
        raise ValueError(f"{name}: expected a list of at least one file or folder, got {paths!r}.")
    files: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p, root=path))
            if not found:
                raise ValueError(
                    f"{name}: expected data files ({', '.join(SUFFIXES)}) in the folder {path}, "
                    "found none."
                )
            files += found
        elif not path.exists():
            raise FileNotFoundError(
                f"{name}: no such file or folder: {path} (looked from {Path.cwd()})."
            )
        elif not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"{name}: expected a file that ends in one of {', '.join(SUFFIXES)}, got {path}."
            )
        else:
            files.append(path)
    return files


def read_documents(files: Iterable[Path], *, text_field: str = "text") -> Iterator[Document]:
    """Yields the documents of ``files`` in order; texts of white space only are skipped.

    Args:
        files: what :func:`find_files` returned. A .txt file is one document; .jsonl has one object
            a line; .parquet one row each.
        text_field: name of the field or column that holds the text.

    Yields:
        Documents with their source.

    Raises:
        ValueError: not UTF-8, not JSON, no such field, half of a surrogate pair in a text, or
            compressed data that is damaged or cut short.
        ImportError: .parquet or .zst without the library that reads it.

    Example:
        >>> for document in read_documents(find_files(["corpus/"])):
        ...     print(document.source, len(document.text))
    """
    for path in files:
        with naming(path):
            if path.suffix == ".txt":
                documents: Iterator[Document] = iter([_read_txt(path)])
            elif path.suffix == ".parquet":
                documents = _read_parquet(path, text_field)
            else:
                documents = _read_jsonl(path, text_field)
            for document in documents:
                if document.text.strip():
                    yield document


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of one .jsonl file, plain or compressed, each after where it stands.

    Args:
        path: the file; empty lines in it are skipped.

    Yields:
        ``file:line`` (counted from 1) and the object.

    Raises:
        ValueError: not UTF-8, a line that is no JSON object, or compressed data that is damaged or
            cut short.
        ImportError: .zst without the library that reads it.
    """
    for number, raw in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        line = _decode(raw, where)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also integers too long, lists too deep
            raise ValueError(
                f"{where}: expected one JSON object per line, got {line.strip()[:40]!r} ({error})."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, got {repr(record)[:40]}.")
        yield where, record


def _is_data(path: Path, *, root: Path) -> bool:
    visible = not any(part.startswith(".") for part in path.relative_to(root).parts)
    return visible and path.name.endswith(SUFFIXES)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8, got byte 0x{raw[error.start]:02x} at offset {error.start}. "
            "Convert the file, for example with: iconv -f LATIN1 -t UTF-8."
        ) from error


def _read_txt(path: Path) -> Document:
    return Document(str(path), _decode(path.read_bytes(), str(path)))


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    for where, record in read_records(path):
        if text_field not in record:
            raise ValueError(
                f"{where}: expected an object with the field {text_field!r}, "
                f"got the keys {sorted(record)}. "
                "Set data.text_field if the text has another name."
            )
        text = record[text_field]
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: expected a string in {text_field!r}, got {type(text).__name__}."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: expected Unicode text in {text_field!r}, got half of a surrogate pair "
                f"at character {error.start}: \\u{ord(text[error.start]):04x}. Leave it out, or "
                "write the pair whole."
            ) from error
        yield Document(where, text)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        if path.suffix == ".zst":
            yield from _split_lines(_zstd_chunks(path))
        else:
            opened = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)(path, "rb")
            with opened as file:
                yield from file
        if path.suffix in (".gz", ".zst") and not path.stat().st_size:
            raise EOFError("the file is empty")  # which their readers take for empty data
    except EOFError as error:
        raise ValueError(
            f"{path}: the compressed data is cut short ({error}). Copy or download the file again."
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: the compressed data is damaged ({error}). Copy or download the file again."
        ) from error


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            yield b"".join([*pending, line])
            pending = []
        pending.append(rest)
    if any(pending):
        yield b"".join(pending)


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            f'{path}: reading .zst needs zstandard: pip install "native-sparse-attention[train]"'
        ) from error
    # zstandard's own stream reader ends without an error when a frame is cut short, so frames are
    # walked by hand.
    decompressor = None
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                while chunk:
                    decompressor = decompressor or zstandard.ZstdDecompressor().decompressobj()
                    yield decompressor.decompress(chunk)
                    chunk = decompressor.unused_data if decompressor.eof else b""
                    if decompressor.eof:
                        decompressor = None
    except zstandard.ZstdError as error:
        raise ValueError(
            f"{path}: the compressed data is damaged ({error}). Copy or download the file again."
        ) from error
    if decompressor is not None:
        raise EOFError("the last zstd frame has no end")


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f'{path}: reading .parquet needs pyarrow: pip install "native-sparse-attention[train]"'
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise ValueError(
                    f"{path}: expected a column {text_field!r}, got {columns}. "
                    "Set data.text_field if the text has another name."
                )
            row = 0
            for batch in file.iter_batches(columns=[text_field], batch_size=256):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise ValueError(
                            f"{path}:{row}: expected a string in {text_field!r}, "
                            f"got {type(text).__name__}."
                        )
                    yield Document(f"{path}:{row}", text)
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: not a whole Parquet file ({error}). Copy or download the file again."
        ) from error
