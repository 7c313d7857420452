"""Every format gives the same documents; every kind of damage names the file and the line."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from nsa.train.documents import find_files, read_documents

TEXTS = ["first", "zweites é", "third\nwith a line"]
LINES = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)).encode()


def _zstd_frames(data: bytes) -> bytes:
    middle = len(data) // 2
    compress = zstandard.ZstdCompressor().compress
    return compress(data[:middle]) + compress(data[middle:])


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.xz": lzma.compress,
    ".jsonl.zst": _zstd_frames,
}


def _texts(path: Path, **options: str) -> list[str]:
    return [document.text for document in read_documents([path], **options)]


@pytest.mark.parametrize("suffix", PACK)
def test_jsonl_reads_every_compression(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(PACK[suffix](LINES))
    assert _texts(path) == TEXTS
    assert [d.source for d in read_documents([path])] == [f"{path}:{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
def test_cut_short_compression_is_an_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus{suffix}"
    # Long and random enough that the cut falls inside the data, not the footer.
    rows = [json.dumps({"text": f"{i} {hash((i, 'x'))}"}) for i in range(3000)]
    packed = PACK[suffix]("\n".join(rows).encode())
    path.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(ValueError, match=r"corpus.*: the compressed data is cut short"):
        _texts(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"corpus.*: the compressed data is cut short"):
        _texts(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
def test_damaged_compression_is_an_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(b"this was never compressed")
    with pytest.raises(ValueError, match=r"corpus.*: the compressed data is damaged"):
        _texts(path)


def test_txt_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfchapter one\nchapter two\n")
    assert _texts(path) == ["chapter one\nchapter two\n"]


def test_parquet_reads_the_named_column(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    parquet.write_table(pa.table({"body": TEXTS, "text": ["x"] * 3}), path)
    assert _texts(path, text_field="body") == TEXTS


def test_blank_lines_and_white_space_texts_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "  \\n"}\n{"text": "b"}')
    assert _texts(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param(b"{'text': 1}", r"corpus\.jsonl:2: expected one JSON object", id="not-json"),
        pytest.param(b'{"txt": "a"}', r"jsonl:2: .*field 'text', got the keys \['txt'\]", id="key"),
        pytest.param(b'["text"]', r"jsonl:2: expected an object", id="list"),
        pytest.param(b'{"text": 3}', r"jsonl:2: expected a string in 'text', got int", id="type"),
        pytest.param(b'{"text": "\xe9"}', r"jsonl:2: expected UTF-8, got byte 0xe9", id="latin1"),
        pytest.param(
            b'{"text": "a\\ud800"}', r"jsonl:2: .*at character 1: \\ud800", id="surrogate"
        ),
        pytest.param(b'{"n": %s}' % (b"1" * 4301), r"jsonl:2: .*4300 digits", id="long-integer"),
        pytest.param(b"[" * 100_000, r"jsonl:2: .*maximum recursion depth", id="deep"),
    ],
)
def test_bad_line_names_file_and_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        _texts(path)


def test_txt_that_is_not_utf8_names_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"se\xf1or")
    with pytest.raises(ValueError, match=r"book\.txt: expected UTF-8, got byte 0xf1 at offset 2"):
        _texts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"body": ["a"]}, r"expected a column 'text', got \['body'\]", id="no-column"),
        pytest.param({"text": ["a", None]}, r"parquet:2: expected a string", id="null"),
        pytest.param(None, r"not a whole Parquet file", id="not-parquet"),
    ],
)
def test_bad_parquet(content: dict[str, list[object]] | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    if content is None:
        path.write_bytes(b"PAR1 but not really, and no footer to be found here")
    else:
        parquet.write_table(pa.table(content), path)
    with pytest.raises(ValueError, match=message):
        _texts(path)


@pytest.mark.parametrize(
    ("suffix", "module", "name"),
    [
        pytest.param(".jsonl.zst", "zstandard", "zstandard", id="zstd"),
        pytest.param(".parquet", "pyarrow", "pyarrow", id="parquet"),
    ],
)
def test_missing_extra_is_named(
    suffix: str, module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"corpus{suffix}"
    path.touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install .*\[train\]"):
        _texts(path)


def test_find_files_sorts_folders_and_skips_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/.hidden.txt", ".git/x.txt", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    single = tmp_path / "b.txt"
    assert find_files([single, tmp_path]) == [single, tmp_path / "a/z.jsonl", single]


def test_find_files_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.train: no such file or folder: .*nowhere"):
        find_files([tmp_path / "nowhere"], name="data.train")
    with pytest.raises(ValueError, match=r"expected data files .* found none"):
        find_files([tmp_path])
    with pytest.raises(ValueError, match=r"expected a list of at least one file or folder"):
        find_files([])
    (tmp_path / "x.csv").touch()
    with pytest.raises(ValueError, match=r"expected a file that ends in one of .*x\.csv"):
        find_files([tmp_path / "x.csv"])


def test_failed_read_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.symlink_to("/proc/self/mem")  # its beginning cannot be read
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.txt'"):
        list(read_documents([path]))
