"""Files: every format and compression, only regular files inside the folder, and no more than is wanted."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import sys
import time
import types
from pathlib import Path

import pytest
from small_texts import texts, write

from tunediff.core.errors import CorpusError, MissingExtraError, SourceError
from tunediff.texts.corpus import Corpus

TEXTS = [record["text"] for record in texts(4)]


def told(corpus: Corpus) -> dict[str, int]:
    return {remark.what: remark.count for remark in corpus.remarks}


def read(path: Path | str | list, **settings) -> list[str]:
    return [document.text for document in Corpus.from_files(path, **settings).documents]


LINES = "".join(json.dumps(record) + "\n" for record in texts(4))
TABLE = "n,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(TEXTS))
FILES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "array.jsonl": json.dumps(texts(4)),
    "array.json": json.dumps(texts(4), indent=2),
    "data.json": json.dumps({"version": 1, "data": texts(4)}),
    "rows.json": json.dumps({"features": [{"x": 1}], "rows": [{"row_idx": n, "row": r} for n, r in enumerate(texts(4))]}),
    "columns.json": json.dumps({"text": TEXTS, "n": [1, 2, 3, 4]}, indent=1),
    "one_after_the_other.json": "\n".join(json.dumps(record, indent=2) for record in texts(4)),
    "a.csv": TABLE,
    "semicolons.csv": TABLE.replace("n,", "n;").replace(',"', ';"'),
    "a.tsv": "n\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(TEXTS)),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_format_in_every_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding=encoding)
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize(("suffix", "packed"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path: Path, suffix: str, packed) -> None:
    for name, text in FILES.items():
        (tmp_path / f"{name}{suffix}").write_bytes(packed(text.encode()))
        assert read(tmp_path / f"{name}{suffix}") == TEXTS
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(packed(LINES.encode() * 50)[:-12])
    with pytest.raises(SourceError, match="cannot be read"):
        Corpus.from_files(tmp_path / f"cut.jsonl{suffix}")


def test_parquet_arrow_feather_and_zstd(tmp_path: Path) -> None:
    pyarrow, feather, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.feather", "pyarrow.parquet"))
    table = pyarrow.table({"text": TEXTS, "image": [b"\xff"] * 4, "n": range(4)})
    parquet.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, str(tmp_path / "a.feather"))
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    with pyarrow.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (saved / "dataset_info.json").write_text('{"description": "text"}')
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(LINES.encode())
    for name in ("a.parquet", "a.feather", "saved", "a.jsonl.zst"):
        corpus = Corpus.from_files(tmp_path / name)
        assert [document.text for document in corpus.documents] == TEXTS
        assert told(corpus).get("columns of binary left out", 0) == (not name.endswith("zst"))
    assert Corpus.from_files(tmp_path / "saved").documents[0].id == "train/data-00000-of-00001#0"


def test_patterns_and_folders(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", {"text": f"In {name}."})
    (tmp_path / "y" / "__init__.py").write_text("")
    assert (
        read(f"{tmp_path}/*/*.jsonl") == read(f"{tmp_path}/**/*.jsonl") == read(f"{tmp_path}/?") == ["In x.", "In y."]
    )
    corpus = Corpus.from_files(tmp_path)
    assert len(corpus.documents) == 2 and told(corpus) == {"rows without text left out": 1}
    with pytest.raises(SourceError, match="no file fits"):
        Corpus.from_files(f"{tmp_path}/*.csv")


def test_only_regular_files_inside_the_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("Secret.")
    inside = tmp_path / "in"
    inside.mkdir()
    write(inside / "a.jsonl", *texts(4))
    (inside / "out.txt").symlink_to(tmp_path / "secret.txt")
    (inside / "up").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe.jsonl")
    for given in (inside, f"{inside}/*"):
        corpus = Corpus.from_files(given)
        assert [document.text for document in corpus.documents] == TEXTS
        counts = told(corpus)
        assert counts["links out of the folder not followed"] >= 1
        assert counts["pipes, sockets and devices passed over"] == 1
    assert read(inside / "out.txt") == ["Secret."]  # whoever names a link means it


@pytest.mark.parametrize("name", ["pipe.jsonl", "socket.txt", "/dev/zero", "/dev/null"])
def test_pipes_sockets_and_devices_are_refused_at_once(tmp_path: Path, name: str) -> None:
    path = Path(name) if name.startswith("/") else tmp_path / name
    began = time.monotonic()
    if name.startswith("pipe"):
        os.mkfifo(path)
    elif name.startswith("socket"):
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path)[-100:] if len(str(path)) < 100 else os.path.relpath(path))
    with pytest.raises(SourceError, match="is no regular file"):
        Corpus.from_files(path)
    assert time.monotonic() - began < 5


def test_odd_names_are_no_faults(tmp_path: Path) -> None:
    for name in ("x" * 5_000, "a\0b.txt", "", "[", "**x/[", "a/" * 3_000 + "*.txt", "owner/name.jsonl"):
        with pytest.raises((SourceError, CorpusError)):
            Corpus.from_files(str(tmp_path / name))
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(path, "wb") as file:
        file.write(b"Text.")
    (document,) = Corpus.from_files(os.fsdecode(path)).documents
    assert document.id.encode() and Corpus("x", (document,)).fingerprint
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert read(tmp_path) == ["Text."]


def test_latin_1_is_read_and_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Grüße\n".encode("latin-1") + "aus Köln".encode())
    corpus = Corpus.from_files(tmp_path / "a.txt")
    assert corpus.documents[0].text == "Grüße\naus Köln"
    assert told(corpus) == {"lines that are not UTF-8 read as Latin-1": 1}


def test_a_large_file_is_read_at_places_all_over_it(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"text": f"Line {n} " + "x" * 900}) + "\n" for n in range(20_000))
    corpus = Corpus.from_files(path, max_bytes=1 << 20)
    lines = [int(document.text.split()[1]) for document in corpus.documents]
    assert 800 < len(lines) < 1300 and lines == sorted(set(lines))
    for part in range(10):
        assert any(2_000 * part <= line < 2_000 * (part + 1) for line in lines)
    assert corpus.documents[3].id.startswith("large#@")
    few = Corpus.from_files(path, max_documents=100)
    lines = [int(document.text.split()[1]) for document in few.documents]
    assert 50 < len(lines) <= 100 and max(lines) > 10_000
    for one in (corpus, few):
        (remark,) = one.remarks
        assert "corpus.max_bytes" in remark.what and remark.first == str(path)
    (tmp_path / "large.txt").write_text("\n".join(f"Line {n} " + "x" * 90 for n in range(20_000)))
    prose = Corpus.from_files(tmp_path / "large.txt", max_bytes=1 << 17)
    assert sum(len(document.text) for document in prose.documents) < 1 << 18
    assert "Line 19" in "".join(document.text for document in prose.documents)


def test_what_is_decompressed_is_limited(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "bomb.txt.gz", "wb") as file:
        for _ in range(200):
            file.write(b"word " * 200_000 + b"\n")
    assert (tmp_path / "bomb.txt.gz").stat().st_size < 1 << 20
    corpus = Corpus.from_files(tmp_path / "bomb.txt.gz", max_bytes=2 << 20)
    assert sum(len(document.text) for document in corpus.documents) <= 4 << 20
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as file:
        file.write((json.dumps({"text": "x" * 1_000}) + "\n").encode() * 50_000)
    corpus = Corpus.from_files(tmp_path / "bomb.jsonl.gz", max_bytes=1 << 20)
    assert len(corpus.documents) < 1_100 and "corpus.max_bytes" in corpus.remarks[-1].what


def test_a_small_parquet_file_that_says_much_is_limited(tmp_path: Path) -> None:
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    one = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4096, pyarrow.int32()), ["y" * (1 << 19)])
    parquet.write_table(pyarrow.table({"text": one}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 12  # of 2 GiB of text
    before = pyarrow.total_allocated_bytes()
    corpus = Corpus.from_files(tmp_path / "a.parquet", max_bytes=1 << 22)
    assert 7 <= len({document.group for document in corpus.documents}) or corpus.remarks
    assert sum(len(document.text) for document in corpus.documents) <= 5 << 20
    assert pyarrow.total_allocated_bytes() - before < 64 << 20


def test_a_parquet_file_that_is_packed_as_no_text_is_refused(tmp_path: Path) -> None:
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    table = pyarrow.table({"text": ["z" * (1 << 24)] * 4})
    parquet.write_table(table, tmp_path / "a.parquet", compression="brotli", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 12
    with pytest.raises(SourceError, match="row group 1 is too large"):
        Corpus.from_files(tmp_path / "a.parquet", max_bytes=1 << 24)


def test_large_parquet_files_are_read_at_places_all_over_them(tmp_path: Path) -> None:
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    rows = [f"Row {n} " + "".join(map(str, range(n, n + 50))) for n in range(4_000)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", row_group_size=100)
    corpus = Corpus.from_files(tmp_path / "a.parquet", max_bytes=60_000)
    numbers = [int(document.text.split()[1]) for document in corpus.documents]
    assert 100 < len(numbers) < 500 and max(numbers) > 3_000 and len(set(numbers)) == len(numbers)
    few = Corpus.from_files(tmp_path / "a.parquet", max_documents=20)
    assert len(few.documents) <= 20


class Stream(list):
    """What `datasets` streams: rows, and the types of their columns."""

    features = None

    def remove_columns(self, names):
        return Stream({n: v for n, v in row.items() if n not in names} for row in self)


class Image:
    pass


def test_data_sets_of_the_hub_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        rows = Stream({"text": text, "picture": object()} for text in TEXTS)
        rows.features = {"text": str, "picture": Image()}
        return rows if split else {"test": Stream(), "train": rows}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = Corpus.from_files("owner/some-set")
    assert [document.text for document in corpus.documents] == TEXTS
    assert told(corpus) == {"splits of a data set left out": 1, "columns of images and sounds left out": 1}
    assert read(["owner/some-set:main:test"]) == TEXTS
    assert asked == [("owner/some-set", None, None, True), ("owner/some-set", "main", "test", True)]
    assert len(read("owner/some-set:test", max_documents=2)) == 2


def test_without_datasets_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tunediff\[datasets\]'"):
        Corpus.from_files("owner/some-set")
    with pytest.raises(SourceError, match="does not exist"):
        Corpus.from_files("no/such/file")


def test_prompts_are_lines_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("What is new?\n\n  Why?  \n")
    corpus = Corpus.from_files(tmp_path / "a.txt", prompts=True)
    assert [document.messages for document in corpus.documents] == [(("user", "What is new?"),), (("user", "Why?"),)]
    (tmp_path / "one.txt").write_text("Only one?")
    (document,) = Corpus.from_files(tmp_path / "one.txt", prompts=True).documents
    assert document.is_open
