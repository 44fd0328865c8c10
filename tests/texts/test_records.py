"""Records: what trainers write is read, whichever columns it is in; what is left out is counted; nothing else happens."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_texts import write

from tunediff.core.errors import TunediffError
from tunediff.texts.corpus import Corpus

U, A = ("user", "Hi"), ("assistant", "Hello")
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

FORMS = {
    "messages": ({"messages": CHAT}, (U, A)),
    "messages in a text": ({"messages": json.dumps(CHAT)}, (U, A)),
    "messages as Python prints them": ({"messages": str(CHAT)}, (U, A)),
    "messages in a nested object": ({"conversation": {"id": 3, "messages": CHAT}}, (U, A)),
    "roles as keys": ({"conversation": {"user": "Hi", "assistant": "Hello"}}, (U, A)),
    "turns as objects of both": ({"conversation": [{"human": "Hi", "assistant": "Hello"}]}, (U, A)),
    "input and output turns": (
        {"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Hello"}]},
        (("system", "Be brief."), U, A),
    ),
    "alternating texts": ({"dialog": ["Hi", "Hello", "Bye"]}, (U, A, ("user", "Bye"))),
    "pairs": ({"conversation": [["Hi", "Hello"], ["And?", "No."]]}, (U, A, ("user", "And?"), ("assistant", "No."))),
    "pairs of role and text": ({"conversation": [["human", "Hi"], ["gpt", "Hello"]]}, (U, A)),
    "another name": ({"my_dialogs": CHAT, "score": 3, "note": "x"}, (U, A)),
    "system column": ({"system": "Be brief.", "conversations": CHAT}, (("system", "Be brief."), U, A)),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, (U, A)),
    "ShareGPT with text": ({"conversations": [{"from": "Human", "text": "Hi"}, {"from": "GPT", "text": "Hello"}]}, (U, A)),
    "one message a file": (CHAT, (U, A)),
    "TRL prompt and completion": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, (U, A)),
    "TRL prompt and one message": ({"prompt": CHAT[:1], "completion": CHAT[1]}, (U, A)),
    "TRL prompt and text": ({"prompt": CHAT[:1], "completion": "Hello"}, (U, A)),
    "preference, explicit prompt": ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, (U, A)),
    "preference, prompt within": ({"chosen": CHAT, "rejected": CHAT}, (U, A)),
    "preference, prompt twice": ({"prompt": "Hi", "chosen": CHAT, "rejected": CHAT}, (U, A)),
    "preference, texts": ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, (U, A)),
    "preference, question and system": (
        {"system": "Be brief.", "question": "Hi", "chosen": "Hello", "rejected": "No"},
        (("system", "Be brief."), U, A),
    ),
    "preference, one text": ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi"}, (U, A)),
    "Alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, (U, A)),
    "Alpaca with input": ({"instruction": "Add", "input": "1 2", "output": "3"}, (("user", "Add\n\n1 2"), ("assistant", "3"))),
    "Alpaca with a null input": ({"instruction": "Hi", "input": None, "output": "Hello"}, (U, A)),
    "Alpaca with system and history": (
        {"instruction": "And?", "output": "No.", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        (("system", "Be brief."), U, A, ("user", "And?"), ("assistant", "No.")),
    ),
    "Dolly": ({"instruction": "Hi", "context": "", "response": "Hello", "category": "qa"}, (U, A)),
    "SQuAD": (
        {"context": "A fact.", "question": "Which?", "answers": {"text": ["This", "That"], "answer_start": [0, 1]}},
        (("user", "Which?\n\nA fact."), ("assistant", "This")),
    ),
    "a number as an answer": ({"question": "1 + 1?", "answer": 2}, (("user", "1 + 1?"), ("assistant", "2"))),
    "capital columns": ({"Prompt": "Hi", "Completion": "Hello"}, (U, A)),
    "a prompt alone": ({"prompt": "Hi"}, (U,)),
    "a prompt in one text": ({"prompt": "\n\nHuman: Hi\n\nAssistant:"}, (U,)),
    "OpenAI fine-tuning": ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}], "tools": []}, (U, A)),
    "a tree of messages": (
        {"message_tree_id": "t", "prompt": {"text": "Hi", "role": "prompter", "replies": [{"text": "Hello", "role": "assistant"}]}},
        (U, A),
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, CHAT[1]]},
        (U, A),
    ),
    "a call of a tool": (
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]},
        (U, ("assistant", '{"name": "add", "arguments": {"a": 1}}'), ("tool", "2")),
    ),
    "a call of a function": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "f()"}, {"from": "observation", "value": "2"}]},
        (U, ("assistant", "f()"), ("tool", "2")),
    ),
    "a message without text": ({"messages": [CHAT[0], {"role": "assistant", "content": None}, CHAT[1]]}, (U, A)),
}  # fmt: skip


def told(corpus: Corpus) -> dict[str, int]:
    return {remark.what: remark.count for remark in corpus.remarks}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    record, messages = FORMS[form]
    (document,) = Corpus.from_files(write(tmp_path / "a.jsonl", record)).documents
    assert (document.messages, document.text, document.kind) == (messages, "", "chat")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_serves_as_a_prompt(tmp_path: Path, form: str) -> None:
    record, messages = FORMS[form]
    (document,) = Corpus.from_files(write(tmp_path / "a.jsonl", record), prompts=True).documents
    assert document.is_open and document.messages == messages[: len(document.messages)]
    assert all(role == "assistant" for role, _ in messages[len(document.messages) :])


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "user") for name in ("Human", "USER", "user", "prompter", "human")),
        *(
            (name, "assistant")
            for name in ("GPT", "Assistant", "model", "bot", "chatgpt", "gpt", "ai", "function_call")
        ),
        *((name, "tool") for name in ("function", "observation", "ipython", "tool", "Tool")),
        *((name, "system") for name in ("developer", "System")),
        ("narrator", "narrator"),
    ],
)
def test_roles_by_other_names(tmp_path: Path, name: str, role: str) -> None:
    corpus = Corpus.from_files(write(tmp_path / "a.jsonl", {"messages": [*CHAT, {"role": name, "content": "x"}]}))
    assert corpus.documents[0].messages[-1] == (role, "x")
    unusual = name not in ("user", "assistant", "tool", "system")
    what = "roles not known kept as they are" if role == "narrator" else "roles read by their usual names"
    assert told(corpus) == ({what: 1} if unusual else {})


def test_what_is_left_out_is_counted_and_its_place_is_named(tmp_path: Path) -> None:
    image = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Look"}]
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "score": 3},
        {"messages": [{"role": "user", "content": image}, CHAT[1]]},
        *({"text": text} for text in ("", None, " \n", "Text.")),
        {"question": "Which?", "answers": {"text": ["This", "That"]}},
    )
    corpus = Corpus.from_files(path)
    assert told(corpus) == {
        "rejected answers left out": 1,
        "images and other parts of messages left out": 1,
        "rows without text left out": 3,
        "answers after the first left out": 1,
        "rows with columns that were not read": 1,
    }
    first = {remark.what: remark.first for remark in corpus.remarks}
    assert first["rows without text left out"] == f"{path}, line 3"
    assert first["rows with columns that were not read"] == "score"
    assert len(corpus.documents) == 4


def test_messages_that_stand_in_rows_of_their_own_are_put_together(tmp_path: Path) -> None:
    rows = [
        {"message_id": "1", "parent_id": None, "message_tree_id": "t", "text": "Hi", "role": "prompter"},
        {"message_id": "2", "parent_id": "1", "message_tree_id": "t", "text": "Hello", "role": "assistant"},
        {"message_id": "3", "parent_id": "2", "message_tree_id": "t", "text": "Bye", "role": "prompter"},
    ]
    documents = Corpus.from_files(write(tmp_path / "a.jsonl", *rows)).documents
    assert [d.messages for d in documents] == [(U,), (U, A), (U, A, ("user", "Bye"))]
    assert {d.group for d in documents} == {"t"}


def test_the_one_column_of_text_is_found_and_two_are_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"body": "One.", "n": 1}, {"body": "Two.", "n": 2, "title": "T"})
    corpus = Corpus.from_files(path)
    assert [d.text for d in corpus.documents] == ["One.", "Two."]
    assert told(corpus)["texts read from the one column that holds any"] == 2
    path = write(tmp_path / "b.jsonl", *({"body": f"Body {n}.", "title": f"Title {n}"} for n in range(3)))
    with pytest.raises(TunediffError, match="columns body, title"):
        Corpus.from_files(path)
    assert [d.text for d in Corpus.from_files(path, text_field="title").documents] == ["Title 0", "Title 1", "Title 2"]
    path = write(tmp_path / "c.jsonl", {"text": "no", "log": CHAT})
    assert Corpus.from_files(path, messages_field="log").documents[0].messages == (U, A)


def test_a_small_share_of_unreadable_rows_is_left_out_and_a_large_one_is_refused(tmp_path: Path) -> None:
    good = [{"text": f"Text {n}."} for n in range(40)]
    path = write(tmp_path / "a.jsonl", *good)
    with path.open("a") as file:
        file.write('{"text": \n{"text": "\\ud83d"}\n')
    corpus = Corpus.from_files(path)
    assert len(corpus.documents) == 40 and told(corpus) == {"unreadable rows left out": 2}
    assert corpus.remarks[0].first == f"{path}, line 41 is not JSON"
    with pytest.raises(TunediffError, match="line 41 is not JSON") as caught:
        Corpus.from_files(path, broken=0.04)
    remedy = "--set corpus.broken=0.048"
    assert remedy in str(caught.value) and "2 of 42 rows" in str(caught.value)
    assert len(Corpus.from_files(path, broken=0.048).documents) == 40


def test_ids_that_repeat_or_are_no_text_are_made_unique(tmp_path: Path) -> None:
    ids = ["x", "x", 7, None, ["x"], "a\nb", "y" * 1000, "x"]
    documents = Corpus.from_files(
        write(tmp_path / "a.jsonl", *({"id": id, "text": f"{n}."} for n, id in enumerate(ids)))
    ).documents
    assert [d.id for d in documents] == ["a/x", "a/x~2", "a#2", "a#3", "a#4", "a#5", "a#6", "a/x~3"]


def test_a_long_text_is_cut_into_pieces_of_one_group(tmp_path: Path) -> None:
    long = ["word " * 10_000, "x" * 50_000, "\n".join(["line " * 20] * 500)]
    corpus = Corpus.from_files(write(tmp_path / "a.jsonl", *({"text": text} for text in long), {"text": "Short."}))
    pieces = {f"a#{n}": [d.text for d in corpus.documents if d.group == f"a#{n}"] for n in range(3)}
    assert ["".join(pieces[f"a#{n}"]) for n in range(2)] == long[:2]
    assert "\n".join(pieces["a#2"]) == long[2]
    assert max(len(d.text) for d in corpus.documents) <= 2_100 and told(corpus) == {"long texts cut into pieces": 3}
    many = " ".join(map(str, range(10_000)))
    alone = Corpus.from_files(write(tmp_path / "b.jsonl", {"text": many}), held_out_share=0.4)
    assert len({alone.is_held_out(d) for d in alone.documents}) == 2


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from(["user", "GPT", "a\0b", "\ud83d", "[{", "[{}]", " ", "10" * 3000]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [*("role", "from", "content", "value", "text", "type", "parts", "tool_calls", "function", "messages")]
                + ["user", "replies", "name", "arguments", "author", ""]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
columns = st.sampled_from(
    [
        *(
            "text",
            "content",
            "messages",
            "conversations",
            "prompt",
            "completion",
            "instruction",
            "input",
            "output",
            "chosen",
        )
    ]
    + [
        "rejected",
        "answers",
        "context",
        "history",
        "system",
        "id",
        "kind",
        "group",
        "writer",
        "role",
        "other",
        "PROMPT",
    ]
    + ["message_id", "parent_id", "data", "rows", ""]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.one_of(st.dictionaries(columns, values, max_size=4), values), min_size=1, max_size=5),
    prompts=st.booleans(),
)
def test_any_rows_are_documents_counted_or_refused(rows: list, prompts: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("a.jsonl", "\n".join(map(json.dumps, rows))), ("a.json", json.dumps(rows))):
            (Path(folder) / name).write_text(text, encoding="utf-8")
            try:
                corpus = Corpus.from_files(Path(folder) / name, broken=1.0, prompts=prompts)
            except TunediffError as error:
                assert len(error.lines()) <= 4
                continue
            for document in corpus.documents:
                (document.text + "".join(role + content for role, content in document.messages)).encode()
                assert document.is_open or not prompts
            if name == "a.jsonl" and len(rows) > 1:
                skipped = ("unreadable rows left out", "rows without text left out")
                assert len(corpus.documents) + sum(told(corpus).get(what, 0) for what in skipped) == len(rows)
