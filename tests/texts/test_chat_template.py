"""Chat templates: one is chosen for a pair, foreign ones run within limits, and chats that they refuse are adapted."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from small_texts import CHATML, make_tokenizer

from tunediff.core.errors import CorpusError, SettingError
from tunediff.texts import chat_template
from tunediff.texts.chat_template import ChatTemplate, Refused, TooSlow, check_options, template_file
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document

STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}model: {% endif %}"
)
THINK = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and '</think>' in m['content'] %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
TOOLS, SYSTEM, OPENING, MERGED = chat_template.ADAPTATIONS
HELLO = (("user", "Hi there"),)


def chat(*turns: str, id: str = "a") -> Document:
    """A document of turns, each ``role: content``."""
    return Document(id, "chat", messages=tuple(tuple(turn.split(": ", 1)) for turn in turns))


# -- whose template ------------------------------------------------------------------------------------------------


def test_auto_is_tuneds_then_bases_then_plain_lines():
    none, mine, theirs = (make_tokenizer(template=t) for t in (None, CHATML, STRICT))
    for base, tuned, origin, text in (
        (mine, theirs, "tuned", STRICT),
        (none, theirs, "tuned", STRICT),
        (mine, none, "base", CHATML),
        (none, none, "plain", ""),
    ):
        chosen = ChatTemplate.chosen("auto", base, tuned)
        assert (chosen.origin, chosen.text) == (origin, text)
    assert ChatTemplate.chosen("base", mine, theirs).text == CHATML
    assert ChatTemplate.chosen("plain", mine, theirs).written(HELLO, True) == "User: Hi there\nAssistant:"
    with pytest.raises(SettingError, match="base brings no chat template") as caught:
        ChatTemplate.chosen("base", none, theirs)
    assert "--set pair.template=auto" in caught.value.remedy


def test_a_file_is_a_template_and_what_is_none_is_told(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(STRICT)
    chosen = ChatTemplate.chosen(str(path), make_tokenizer(), make_tokenizer())
    assert chosen.origin == str(path) and chosen.written(HELLO, True) == "user: Hi there\nmodel: "
    for content, said in (
        (None, "is no file"),
        (b"{% for m in messages %}{{ m.content }", "is no Jinja template"),
        (b"\xff\xfe", "not UTF-8"),
        (b" \n", "is empty"),
        (b"x" * (1 << 21), "too large"),
    ):
        odd = tmp_path / "odd.jinja"
        if content is not None:
            odd.write_bytes(content)
        with pytest.raises(SettingError, match=said):
            template_file(str(odd))
    with pytest.raises(SettingError, match="is no file"):
        template_file(str(tmp_path))


def test_of_several_named_templates_the_default_is_taken():
    named = {"tool_use": STRICT, "default": CHATML, "rag": THINK}
    tokenizer = make_tokenizer()
    for given in (named, [{"name": name, "template": text} for name, text in named.items()]):
        tokenizer.chat_template = given
        assert ChatTemplate.of(tokenizer).text == CHATML
    tokenizer.chat_template = {"tool_use": STRICT, "rag": THINK}
    assert ChatTemplate.of(tokenizer, "tuned").origin == "tuned (rag)"


def test_a_template_kept_in_a_file_of_its_own_is_read(tmp_path):
    from transformers import AutoTokenizer

    make_tokenizer(template=STRICT).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert (tmp_path / "chat_template.jinja").is_file()
    assert ChatTemplate.of(AutoTokenizer.from_pretrained(tmp_path)).text == STRICT


def test_the_fingerprint_tells_what_the_text_depends_on():
    one = ChatTemplate("tuned", THINK, {"bos_token": "<s>"})
    assert one.fingerprint == ChatTemplate("base", THINK, {"bos_token": "<s>"}, seconds=3).fingerprint
    others = [
        ChatTemplate("tuned", STRICT, {"bos_token": "<s>"}),
        ChatTemplate("tuned", THINK, {"bos_token": "<t>"}),
        ChatTemplate("tuned", THINK, {"bos_token": "<s>"}, date="2020-01-01"),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4


# -- what runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        CHATML,
        THINK,
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m | tojson(indent=1) }}{% endfor %}",
        "{%- set ns = namespace(last=0) %}\n  {%- for m in messages %}\n{%- set ns.last = loop.index %}\n{%- endfor %}\n{{ ns.last }}\n",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% macro turn(m) %}[{{ m['content'] | trim }}]{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}{{ tools is none }}",
        "{{ dict(a=messages[0].role)['a'] }}{{ messages[0].name is defined }}{{ messages[-1]['content'][:2] }}",
    ],
)
def test_templates_give_the_text_that_transformers_gives(text):
    tokenizer = make_tokenizer(template=text)
    messages = (("user", " Grüße, «x» "), ("assistant", "<think>a</think>b"), ("user", "more"))
    dicts = [{"role": role, "content": content} for role, content in messages]
    for open in (False, True):
        theirs = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=open)
        assert ChatTemplate.of(tokenizer).written(messages, open) == theirs


def test_the_date_and_the_options_are_the_users():
    text = (
        "{{ strftime_now('%d %b %Y') }}{% if not enable_thinking %} quiet{% endif %} {{ mood }}{{ [1, 2, 3] | random }}"
    )
    for _ in range(2):
        assert ChatTemplate("tuned", text).written(HELLO).startswith("26 Jul 2024 quiet ")
    template = ChatTemplate.chosen(
        "tuned", None, make_tokenizer(template=text), {"enable_thinking": True, "mood": "gay"}, "2031-02-03"
    )
    assert template.written(HELLO).startswith("03 Feb 2031 gay") and template.is_dated
    assert len({template.written(HELLO) for _ in range(5)}) == 1, "random choices are the same each time"
    closed = ChatTemplate("tuned", THINK, {"enable_thinking": False}).written(HELLO, True)
    assert closed.endswith("<|assistant|><think>\n\n</think>\n\n")


@pytest.mark.parametrize("options", [{"messages": 1}, {"a-b": 1}, {"add_generation_prompt": True}, {"day": {1, 2}}])
def test_options_that_are_none_are_refused(options):
    with pytest.raises(SettingError, match="pair.template_options"):
        check_options(options, "2024-01-01")


def test_a_date_that_is_none_is_refused():
    with pytest.raises(SettingError, match="pair.date") as caught:
        check_options({}, "26 Jul 2024")
    assert caught.value.remedy == "--set pair.date=2024-07-26"


@pytest.mark.parametrize(
    "text", ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 10 ** (10 ** 9) }}"]
)
def test_a_template_that_does_not_end_is_ended(text):
    began = time.monotonic()
    with pytest.raises(TooSlow, match="no end within"):
        ChatTemplate("tuned", text, seconds=0.5).written(HELLO)
    assert time.monotonic() - began < 30
    assert ChatTemplate("tuned", "ok").written(HELLO) == "ok", "the next one is not harmed"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for i in range(9999) %}{{ 'a' * 1000 }}{% endfor %}", "characters of output"),
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[7].content }}", "no element"),
        ("{% include 'x' %}", "loader"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_may_not_do_is_a_refusal(text, said):
    with pytest.raises(Refused, match=said):
        ChatTemplate("tuned", text).written(HELLO)


def test_a_template_that_is_no_jinja_is_told_by_its_line():
    with pytest.raises(CorpusError, match="is no Jinja template") as caught:
        ChatTemplate("tuned", "a\n{% if %}").render(HELLO)
    assert "line 2" in caught.value.got and "--set pair.template=plain" in caught.value.remedy


def test_the_worker_ends_with_its_process():
    code = (
        "from tunediff.texts import chat_template as c; print(c.ChatTemplate('t', 'x').written((('user', 'a'),)));"
        "print(*[w.pid for w in c._workers.values()])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    text, pid = out.split()
    assert text == "x"
    listed = subprocess.run(["ps", "-p", pid, "-o", "args="], capture_output=True, text=True).stdout
    assert "template_worker" not in listed


# -- chats that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "how", "text"),
    [
        (["user: a", "assistant: b"], (), "user: a\nassistant: b\n"),
        (["system: s", "user: a"], (SYSTEM,), "user: s\n\na\n"),
        (["user: a", "user: b"], (MERGED,), "user: a\n\nb\n"),
        (["assistant: g", "user: a"], (OPENING,), "user: a\n"),
        (["system: s"], (SYSTEM,), "user: s\n"),
        (["user: a", "tool: t", "assistant: b"], (TOOLS, MERGED), "user: a\n\nt\nassistant: b\n"),
        (
            ["system: s", "assistant: g", "user: a", "function_call: {}", "observation: ok", "assistant: b"],
            (TOOLS, SYSTEM, OPENING, MERGED),
            "user: s\n\na\n\n{}\n\nok\nassistant: b\n",
        ),
    ],
)
def test_chats_that_a_template_refuses_are_adapted_as_little_as_it_takes(turns, how, text):
    rendered = ChatTemplate("tuned", STRICT).render(chat(*turns).messages)
    assert rendered.how == how and rendered.text == text


def test_system_text_that_a_template_drops_is_put_before_the_users():
    drops = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    rendered = ChatTemplate("tuned", drops).render(chat("system: be kind", "user: a").messages)
    assert rendered.text == "user: be kind\n\na\n" and rendered.how == (SYSTEM,)
    first = ChatTemplate("tuned", "{{ messages[0].content }}")
    told = first.render(chat("user: a", "assistant: b").messages).how
    assert told == ("chats of which the template leaves out part of what assistant says",)


def test_one_document_never_ends_a_run_and_all_that_is_done_is_counted():
    never = (
        "{% if 'bad' in messages[0].content %}{{ raise_exception('I refuse ' ~ messages[0].content) }}{% endif %}"
        + STRICT
    )
    documents = [chat("user: fine", "assistant: yes", id=f"d{n}") for n in range(5)]
    documents += [
        chat("system: s", "user: a", "assistant: b", id="s"),
        chat("user: bad", id="x"),
        chat("assistant: g", id="g"),
    ]
    tokens = Corpus("c", tuple(documents)).tokens(make_tokenizer(template=never))
    assert sorted({tokens.documents[d].id for d in tokens.document_R}) == ["d0", "d1", "d2", "d3", "d4", "s"]
    left_out = "chats left out, as the template refuses them"
    told = {remark.what: (remark.count, remark.first) for remark in tokens.remarks}
    assert told[SYSTEM] == (1, "s") and told[f"{left_out} (I refuse bad)"] == (1, "x")
    assert sum(count for what, (count, _) in told.items() if what.startswith(left_out)) == 2
    with pytest.raises(CorpusError, match="no tokens") as caught:
        Corpus("c", tuple(documents[-2:])).tokens(make_tokenizer(template=never))
    assert "I refuse bad" in caught.value.got and caught.value.remedy == "--set pair.template=plain"


def test_a_template_that_is_slow_on_every_chat_is_given_up(monkeypatch):
    asked = []

    def late(request):
        asked.append(request)
        return {"late": True}

    monkeypatch.setattr(chat_template, "_ask", late)
    with pytest.raises(CorpusError, match="did not end on 3 chats") as caught:
        Corpus("c", tuple(chat("system: s", "user: a", id=f"d{n}") for n in range(9))).tokens(make_tokenizer())
    assert len(asked) == 3 and "--set pair.template_seconds=60" in caught.value.remedy


def test_a_think_block_of_the_generation_prompt_is_no_part_of_an_answer():
    """In a corpus, an answer begins where the text and the opening of an answer part."""
    tokenizer = make_tokenizer(template=THINK)
    tokens = Corpus("c", (chat("user: Hi", "assistant: Well."),)).tokens(tokenizer)
    (row,), (before,) = tokens.rows, tokens.prompt_R
    assert tokenizer.decode(row[:before]).endswith("<|assistant|>") and tokenizer.decode(row[before:]) == "Well.</s>"


def test_documents_with_ids_of_their_own_are_read_as_these():
    tokenizer = make_tokenizer(True)
    asked = chat("user: Hi").answered("shown", "base", prompt_ids=(1, 50, 51, 52), answer_ids=(60, 61, 3))
    tokens = Corpus("c", (asked,)).tokens(tokenizer, row_tokens=3)
    assert tokens.rows == ((1, 50, 51, 52, 60, 61, 3),) and tokens.prompt_R == (4,)
    assert asked.content_key != chat("user: Hi").answered("shown", "base").content_key


def test_the_token_that_ends_a_turn_is_read_off_the_template():
    tokenizer = make_tokenizer()
    assert ChatTemplate.of(tokenizer).end_of_turn(tokenizer) == {3}
    assert ChatTemplate("plain").end_of_turn(tokenizer) == set()
    assert ChatTemplate("tuned", STRICT).end_of_turn(tokenizer) == set()
    assert ChatTemplate("tuned", "{{ raise_exception('x') }}").end_of_turn(tokenizer) == set()
