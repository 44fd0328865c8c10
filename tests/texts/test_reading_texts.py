"""Readers: every file comes back whole; bad files are refused by name."""

from __future__ import annotations

import builtins
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_texts import texts, write

from tunediff.core.errors import CorpusError, MissingExtraError, SettingError, SourceError
from tunediff.texts import files
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document


def test_every_kind_of_file_reads_back(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Prose, with “quotes”.\n\nA second paragraph.\n", encoding="utf-8")
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "ignored.bin").write_bytes(b"\x80\x04")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "deep").mkdir()
    write(
        tmp_path / "deep" / "c.jsonl",
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey"}], "id": "mine"},
        {"instruction": "Add", "input": "1 2", "output": "3", "kind": "sums"},
        {"prompt": "Open?"},
    )
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": texts(2)}))
    corpus = Corpus.from_files(tmp_path)
    by_id = {document.id: document for document in corpus.documents}
    assert by_id["a.txt"].text == "Prose, with “quotes”.\n\nA second paragraph.\n"
    assert by_id["b.py"].kind == "code"
    assert by_id["deep/c#1"].messages == (("user", "Hi"), ("assistant", "Hello"))
    assert by_id["deep/c/mine"].messages == (("user", "Hi"), ("assistant", "Hey"))
    assert by_id["deep/c#3"].messages == (("user", "Add\n\n1 2"), ("assistant", "3"))
    assert by_id["deep/c#3"].kind == "sums"
    assert by_id["deep/c#4"].is_open and not by_id["deep/c#1"].is_open
    assert by_id["d#1"].text == texts(2)[1]["text"]
    assert corpus.kinds == {"prose": 4, "code": 1, "chat": 3, "sums": 1}


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number} " + "word " * 60 for number in range(200)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    documents = Corpus.from_files(tmp_path / "book.txt").documents
    assert len(documents) > 10
    assert "\n\n".join(document.text for document in documents) == "\n\n".join(paragraphs)
    lines = [f"Line {number} " + "word " * 10 for number in range(2000)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    documents = Corpus.from_files(tmp_path / "lines.txt").documents
    assert len(documents) > 10 and "\n".join(document.text for document in documents) == "\n".join(lines)


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    messages = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]] * 2
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "chat.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", "two"], "title": ["a", "b"]}), tmp_path / "text.parquet")
    chat = Corpus.from_files(tmp_path / "chat.parquet")
    assert chat.documents[0].messages == (("user", "Hi"), ("assistant", "Hello"))
    assert [d.text for d in Corpus.from_files(tmp_path / "text.parquet", text_field="body").documents] == ["one", "two"]
    with pytest.raises(SourceError, match=r"row 1.*\n.*\n.*columns body, title"):
        Corpus.from_files(tmp_path / "text.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "text.parquet").read_bytes()[:-9])
    with pytest.raises(SourceError, match="cut.parquet is not a whole Parquet file"):
        Corpus.from_files(tmp_path / "cut.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def without(name: str, *rest: object, **named: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"tunediff\[parquet\]"):
        Corpus.from_files(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("name", "data", "error", "told"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', SourceError, "line 2 is not JSON"),
        ("a.jsonl", b'{"text": \n{"text": "fine"}\n', SourceError, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n7\n', SourceError, "line 2: a record is not an object"),
        ("a.jsonl", b'{"body": "x", "title": "y", "n": 1}\n', SourceError, "columns body, title, n"),
        ("a.jsonl", b'{"body": "x", "title": "y"}\n', SourceError, "--set corpus.text_field="),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', SourceError, "line 1: the text holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', SourceError, "line 1: the text holds NUL"),
        ("a.jsonl", b'{"text": {"a": 1}}\n', SourceError, "no text in the record"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', SourceError, "line 1: a message is not one"),
        ("a.jsonl", b"[" * 100_000, SourceError, "line 1 is not JSON"),
        ("a.jsonl", b"", CorpusError, "holds no text"),
        ("a.jsonl", b'{"text": "  "}\n{"text": null}\n{}\nnull\n', CorpusError, "rows without text left out: 4"),
        ("a.json", b"[1, 2", SourceError, "line 1 is not JSON"),
        ("a.json", b'[{"text": "fine"},\n{"text": "fine"},\n{"text": oh}]', SourceError, "line 3 is not JSON"),
        ("a.json", b"{ not", SourceError, "line 1 is not JSON"),
        ("a.json", b"7", SourceError, "a record is not an object"),
        ("a.txt", b"", CorpusError, "holds no text"),
        ("a.txt", b"abc\0def", SourceError, "NUL"),
        ("a.txt", "text".encode("utf-16-le"), SourceError, "UTF-16"),
        ("a.csv", b"a,b\n1,2,3\n", SourceError, "line 2 has more cells than the header"),
        ("a.jsonl.gz", b"no gzip", SourceError, "cannot be read"),
        ("a.jsonl.xz", b"no xz", SourceError, "cannot be read"),
        ("a.jsonl.zst", b"no zstd", SourceError, "cannot be read"),
        ("a.parquet", b"PAR1", SourceError, "is not a whole Parquet file"),
        ("a.arrow", b"ARROW1", SourceError, "is not a whole Arrow file"),
        ("a.pkl", b"\x80\x04.", SourceError, "is refused"),
        ("a.bin", b"\x80\x04.", SourceError, "is refused"),
        ("a.zip", b"PK", SourceError, "unpack it first"),
        ("a.xyz", b"text", SourceError, "is of no kind that is read"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path: Path, name: str, data: bytes, error: type, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=re.escape(told)) as caught:
        Corpus.from_files(tmp_path / name)
    assert name in str(caught.value)


def test_an_endless_line_is_refused_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 1 << 20)
    for name in ("long.txt", "long.jsonl"):
        with open(tmp_path / name, "wb") as file:
            file.write(b'{"text": "fine"}\n')
            file.seek(100 << 20)
            file.write(b"x")
        with pytest.raises(SourceError, match="byte 17 is too long"):
            Corpus.from_files(tmp_path / name)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere.txt does not exist"):
        Corpus.from_files(tmp_path / "nowhere.txt")
    with pytest.raises(SourceError, match="holds no file that can be read"):
        Corpus.from_files(tmp_path)
    with pytest.raises(CorpusError):
        Corpus.from_files([])
    with pytest.raises(SettingError):
        Corpus("x", (Document("a", "prose", "text"),), held_out_share=1.5)
    with pytest.raises(CorpusError, match="neither"):
        Document("a", "prose")


def test_files_of_one_name_keep_their_ids_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", {"text": f"from {folder}"})
    corpus = Corpus.from_files([tmp_path / "x" / "a.jsonl", tmp_path / "y" / "a.jsonl"])
    assert len({document.id for document in corpus.documents}) == 2
    (tmp_path / "x" / "a.json").write_text('[{"text": "as JSON"}]')
    assert len({document.id for document in Corpus.from_files(tmp_path / "x").documents}) == 2


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1), min_size=1, max_size=8
    )
)
def test_any_text_survives_the_way_through_a_file(texts: list[str]) -> None:
    texts = [text for text in texts if text.strip()] or ["x"]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", *({"text": text} for text in texts))
        assert [document.text for document in Corpus.from_files(path).documents] == texts
