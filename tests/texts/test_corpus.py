"""Corpora: what is read comes back whole, on one side of the split; bad files are refused by name."""

from __future__ import annotations

import builtins
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunediff.core.errors import CorpusError, MissingExtraError, SettingError, SourceError
from tunediff.texts import corpus as corpora
from tunediff.texts.corpus import ASSETS, Corpus, Document, Tokens

ROOT = Path(__file__).resolve().parents[2]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_tokenizer(bos: bool = False, template: str | None = CHATML):
    """A byte tokenizer: a token a byte, ChatML marks as single tokens, with or without a leading <bos>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(marks + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<|im_end|>"
    )
    made.chat_template = template
    return made


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts(count: int, first: int = 0) -> list[dict]:
    return [{"text": f"This is the text with the number {number}."} for number in range(first, first + count)]


# Reading


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
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", "two"], "n": [1, 2]}), tmp_path / "text.parquet")
    chat = Corpus.from_files(tmp_path / "chat.parquet")
    assert chat.documents[0].messages == (("user", "Hi"), ("assistant", "Hello"))
    assert [d.text for d in Corpus.from_files(tmp_path / "text.parquet", text_field="body").documents] == ["one", "two"]
    with pytest.raises(SourceError, match=r"row 1.*\n.*\n.*columns body, n"):
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
        ("a.jsonl", b'{"text": "fine"}\n["a list"]\n', SourceError, "line 2: a record is not an object"),
        ("a.jsonl", b'{"body": "x", "n": 1}\n', SourceError, "columns body, n"),
        ("a.jsonl", b'{"text": 7}\n', SourceError, "line 1: text is not text"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": "  "}\n', CorpusError, "line 3: a document is empty"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', SourceError, "line 1: the text holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', SourceError, "line 1: the text holds NUL"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff\xfe"}\n', SourceError, "line 2 is not UTF-8"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', SourceError, "line 1: a message is not one"),
        ("a.jsonl", b'{"id": "x", "text": "a"}\n{"id": "x", "text": "b"}\n', CorpusError, "occur more than once"),
        ("a.jsonl", b"[" * 100_000, SourceError, "line 1 is not JSON"),
        ("a.jsonl", b"", CorpusError, "holds no text"),
        ("a.json", b"[1, 2", SourceError, "is not JSON"),
        ("a.json", b"7", SourceError, "holds no records"),
        ("a.txt", b"", CorpusError, "is empty"),
        ("a.txt", b"abc\0def", SourceError, "NUL"),
        ("a.txt", "text".encode("utf-16"), SourceError, "line 1 is not UTF-8"),
        ("a.txt", b"fine\nbad \xe9t\xe9\n", SourceError, "line 2 is not UTF-8"),
        ("a.pkl", b"\x80\x04.", SourceError, "is refused"),
        ("a.bin", b"\x80\x04.", SourceError, "is refused"),
        ("a.xyz", b"text", SourceError, "is of no kind that is read"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path: Path, name: str, data: bytes, error: type, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=re.escape(told)) as caught:
        Corpus.from_files(tmp_path / name)
    assert name in str(caught.value) or error is CorpusError


def test_an_endless_line_is_refused_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MAX_DOCUMENT_BYTES", 1 << 20)
    for name in ("long.txt", "long.jsonl"):
        with open(tmp_path / name, "wb") as file:
            file.write(b'{"text": "fine"}\n')
            file.seek(100 << 20)
            file.write(b"x")
        with pytest.raises(SourceError, match="line 2 is too long"):
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


def test_skip_empty_passes_over_empty_documents(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": ""}, {"text": "here"}, {"messages": []})
    assert [document.id for document in Corpus.from_files(tmp_path / "a.jsonl", skip_empty=True).documents] == ["a#1"]


def test_files_of_one_name_keep_their_ids_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", {"text": f"from {folder}"})
    corpus = Corpus.from_files([tmp_path / "x" / "a.jsonl", tmp_path / "y" / "a.jsonl"])
    assert len({document.id for document in corpus.documents}) == 2
    (tmp_path / "x" / "a.json").write_text('[{"text": "as JSON"}]')
    assert len({document.id for document in Corpus.from_files(tmp_path / "x").documents}) == 2


# The split


def test_the_split_is_stable_when_documents_are_added(tmp_path: Path) -> None:
    small = Corpus.from_files(write(tmp_path / "a.jsonl", *texts(200)))
    sides = {document.id: small.is_held_out(document) for document in small.documents}
    large = Corpus.from_files([write(tmp_path / "a.jsonl", *texts(300)), write(tmp_path / "b.jsonl", *texts(50, 900))])
    assert all(
        large.is_held_out(document) == sides[document.id] for document in large.documents if document.id in sides
    )
    assert 0.15 < sum(sides.values()) / 200 < 0.35
    other = Corpus("other", small.documents, seed=1)
    assert any(other.is_held_out(document) != sides[document.id] for document in small.documents)
    assert small.fingerprint != large.fingerprint != other.fingerprint


def test_no_document_and_no_copy_of_one_is_on_both_sides(tmp_path: Path, tokenizer) -> None:
    corpus = Corpus.from_files(write(tmp_path / "a.jsonl", *texts(40), *texts(40)))
    tokens = corpus.tokens(tokenizer, row_tokens=16)
    train, held_out = tokens.select("train"), tokens.select("held_out")
    assert not set(train.document_R) & set(held_out.document_R)
    assert not {train.documents[n].text for n in train.document_R} & {
        held_out.documents[n].text for n in held_out.document_R
    }
    assert len(train) + len(held_out) == len(tokens) == len(tokens.select("all"))
    with pytest.raises(SettingError, match="no split 'test'"):
        tokens.select("test")
    with pytest.raises(CorpusError, match="held_out part of the corpus is empty"):
        Corpus("one", corpus.documents[:1], held_out_share=0.0).tokens(tokenizer).select("held_out")
    assert tokens.select(lambda document: document.id == "a#3").documents[3].id == "a#3"


def test_answers_stay_on_the_side_of_their_prompt() -> None:
    prompts = Corpus.prompts()
    both = [prompt.answered("Yes.", writer) for prompt in prompts.documents[:80] for writer in ("base", "tuned")]
    corpus = Corpus("answers", tuple(both))
    for prompt, one, other in zip(prompts.documents, both[::2], both[1::2]):
        assert corpus.is_held_out(one) == corpus.is_held_out(other) == prompts.is_held_out(prompt)
        assert (one.writer, one.kind, one.id != other.id) == ("base", "contrastive", True)
    with pytest.raises(CorpusError, match="not waiting"):
        both[0].answered("Again.")
    assert len(prompts.plus(both).documents) == 480 + 160


# Tokens


def test_rows_give_back_every_document_whole(tmp_path: Path, tokenizer) -> None:
    corpus = Corpus.from_files(write(tmp_path / "a.jsonl", {"text": "Grüße, 世界! " * 30}, *texts(5)))
    tokens = corpus.tokens(tokenizer, row_tokens=50)
    assert max(map(len, tokens.rows)) <= 50 and min(map(len, tokens.rows)) > 10
    for number, document in enumerate(corpus.documents):
        ids: list[int] = []
        for row, of, start in zip(tokens.rows, tokens.document_R, tokens.start_R):
            if of == number:
                assert start == len(ids)
                ids += row
        assert tokenizer.decode(ids) == document.text
    assert tokens.prompt_R == (0,) * len(tokens)
    assert tokens.counts == {"prose": tokens.count}
    assert tokens.fingerprint == corpus.tokens(tokenizer, row_tokens=50).fingerprint
    assert (
        tokens.fingerprint != corpus.tokens(tokenizer, row_tokens=20).fingerprint != tokens.select("train").fingerprint
    )


def chats() -> Corpus:
    turns = (("user", "Hi there"), ("assistant", "One."), ("user", "More"), ("assistant", "Two words, and then some."))
    return Corpus(
        "chats", (Document("a", "chat", messages=turns), Document("b", "chat", messages=turns[:1])), held_out_share=0
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [None, "plain"])
@pytest.mark.parametrize("row_tokens", [20, 1000])
def test_the_boundary_of_a_chat_is_where_the_last_answer_starts(
    bos: bool, template: str | None, row_tokens: int
) -> None:
    tokenizer = make_tokenizer(bos)
    tokens = chats().tokens(tokenizer, row_tokens=row_tokens, chat_template=template)
    answer, prompt = [], []
    for row, number, before in zip(tokens.rows, tokens.document_R, tokens.prompt_R):
        assert (row[0] == 1) == bos and 1 not in row[1:]
        if number == 0:
            prompt += row[bos:before]
            answer += row[before:]
        else:
            assert before == len(row)
    ends = {None: "<|im_start|>assistant\n", "plain": "\nAssistant:"}[template]
    assert tokenizer.decode(prompt).endswith("More" + ("<|im_end|>\n" if template is None else "") + ends)
    assert (
        tokenizer.decode(answer)
        == {None: "Two words, and then some.<|im_end|>\n", "plain": " Two words, and then some."}[template]
    )


def test_a_template_that_starts_with_bos_gives_one(tokenizer) -> None:
    tokens = chats().tokens(make_tokenizer(True, "<bos>" + CHATML))
    assert all(row.count(1) == 1 and row[0] == 1 for row in tokens.rows)


def test_templates_that_are_missing_or_refuse_are_told(tokenizer) -> None:
    with pytest.raises(CorpusError, match='chat_template="plain"'):
        chats().tokens(make_tokenizer(template=None))
    with pytest.raises(CorpusError, match="refuses document 'a'"):
        chats().tokens(make_tokenizer(template="{{ raise_exception('roles must alternate') }}"))
    assert Corpus("p", (Document("p", "prose", "Plain text"),)).tokens(make_tokenizer(template=None)).count == 10
    with pytest.raises(SettingError, match="row_tokens"):
        chats().tokens(tokenizer, row_tokens=0)
    with pytest.raises(SettingError, match="limit_tokens"):
        chats().tokens(tokenizer, limit_tokens=0)


def test_a_limit_keeps_every_kind_and_both_splits_in_proportion(tokenizer) -> None:
    corpus = Corpus.default()
    whole, part = corpus.tokens(tokenizer), corpus.tokens(tokenizer, limit_tokens=60_000)
    assert 59_000 < part.count <= 60_000
    for split in ("train", "held_out"):
        for kind, count in part.select(split).counts.items():
            share, expected = count / part.count, whole.select(split).counts[kind] / whole.count
            assert 0.5 * expected < share < 2 * expected
        assert part.select(split).counts.keys() == whole.select(split).counts.keys()
    assert part.fingerprint == corpus.tokens(tokenizer, limit_tokens=60_000).fingerprint
    more = corpus.tokens(tokenizer, limit_tokens=90_000)
    assert set(zip(part.document_R, part.start_R)) <= set(zip(more.document_R, more.start_R))
    book = Corpus("book", (Document("b", "prose", "word " * 1000),))
    assert 0 < book.tokens(tokenizer, row_tokens=100, limit_tokens=450).count <= 450
    assert book.tokens(tokenizer, row_tokens=100, limit_tokens=7).count == 7


# Batches


def of_lengths(lengths: list[int]) -> Tokens:
    document = Document("a", "prose", "text")
    rows = tuple(tuple(range(1, length + 1)) for length in lengths)
    zeros = (0,) * len(rows)
    return Tokens(rows, zeros, zeros, zeros, (document,), (False,), pad_id=0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    budget=st.integers(1, 200),
    order=st.sampled_from(["length", "rows"]),
)
def test_batches_hold_every_row_exactly_once(lengths: list[int], budget: int, order: str) -> None:
    tokens = of_lengths(lengths)
    seen: list[int] = []
    for batch in tokens.batches(budget, order):
        assert batch.ids_BT.shape == batch.mask_BT.shape
        assert batch.ids_BT.numel() <= budget or len(batch.rows_B) == 1
        assert bool((batch.mask_BT.long().diff(dim=1) <= 0).all())  # padding on the right only
        assert bool((batch.ids_BT[~batch.mask_BT] == 0).all())
        for ids, mask, row in zip(batch.ids_BT, batch.mask_BT, batch.rows_B.tolist()):
            assert tuple(ids[mask].tolist()) == tokens.rows[row]
            seen.append(row)
    assert sorted(seen) == list(range(len(lengths)))
    assert order == "length" or seen == sorted(seen)


def test_batches_are_the_same_each_time_and_check_their_settings() -> None:
    tokens = of_lengths([3, 9, 9, 1, 4])
    first, second = list(tokens.batches(18)), list(tokens.batches(18))
    assert all(torch.equal(a.ids_BT, b.ids_BT) and torch.equal(a.rows_B, b.rows_B) for a, b in zip(first, second))
    assert first[0].rows_B.tolist() == [1, 2]
    assert first[0].mask_BT.dtype == torch.bool and first[0].ids_BT.dtype == torch.long
    with pytest.raises(SettingError):
        next(tokens.batches(0))
    with pytest.raises(SettingError):
        next(tokens.batches(8, "random"))


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


# What ships


def test_the_default_corpus_loads_and_its_sources_are_in_the_notice(tokenizer) -> None:
    corpus = Corpus.default()
    assert corpus.kinds == {"prose": 200, "chat": 120, "code": 100}
    assert corpus.tokens(tokenizer).select("held_out").counts.keys() == {"prose", "chat", "code"}
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    records = [
        json.loads(line) for path in sorted(ASSETS.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()
    ]
    assert len(records) == 900
    for source in {record["source"] for record in records}:
        assert re.search(rf"^{re.escape(source)}$", notice, re.MULTILINE), source
    assert sum(path.stat().st_size for path in ASSETS.rglob("*")) < 3 << 20


def test_the_prompts_are_balanced_and_open() -> None:
    prompts = Corpus.prompts()
    topics = [re.fullmatch(r"prompts/([a-z-]+)-\d\d", document.id)[1] for document in prompts.documents]
    assert len(set(topics)) == 40 and {topics.count(topic) for topic in topics} == {12}
    assert len(set(topics[:40])) == 40
    said = [document.messages[0][1] for document in prompts.documents]
    assert len(set(said)) == 480 and all(6 <= len(text.split()) <= 25 for text in said)
    assert all(document.is_open for document in prompts.documents)
    assert 0.15 < sum(map(prompts.is_held_out, prompts.documents)) / 480 < 0.35
