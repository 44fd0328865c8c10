"""One chat template for a pair: both models are asked and read in it, exactly as asked, and the record says which it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from command_line import cli

from tunediff.core.errors import SettingError
from tunediff.harvests.contrasts import ContrastSettings
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.records.diff import Diff
from tunediff.runs.plan import CorpusSettings, Plan
from tunediff.runs.run import Run

OWN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
THINK = (  # as DeepSeek-R1 and Qwen3.5 do: opened in the generation prompt, taken out of the history
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
CLOSED = (  # as Qwen3 does where it is not to think: filled in the generation prompt
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
LLAMA = "{{ strftime_now('%d %b %Y') }}\n" + OWN


def tokenizer(template: str | None):
    made = tiny_models.tokenizer()
    made.chat_template = template
    return made


def run(
    folder: Path, base: str | None, tuned: str | None, *settings: str, added: tuple[str, ...] = (), rows: int = 300
) -> Run:
    """A run of a tiny pair whose tokenizers have these templates; tuned's knows the added tokens too."""
    network = tiny_models.module("llama")
    mine, theirs = tokenizer(base), tokenizer(tuned)
    theirs.add_tokens(list(added), special_tokens=True)
    other = tiny_models.tuned_copy(network)
    if rows > 300:
        other.resize_token_embeddings(rows, mean_resizing=False)
    pair = Pair.of(LanguageModel(network, mine, "base"), LanguageModel(other, theirs, "tuned"))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"Say {n}"}) for n in range(6)))
    text = folder / "text.jsonl"
    chats = [[{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"tell {n}"}] for n in range(4)]
    text.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    plan = Plan(
        "base",
        "tuned",
        contrast=ContrastSettings(prompts=4, tokens=5),
        corpus=CorpusSettings(paths=(str(text),), prompts=(str(prompts),), row_tokens=16),
    )
    for setting in settings:
        plan = plan.set(setting)
    return Run(plan, folder / "run", given=pair)


def read(run: Run, kind: str = "contrastive") -> list[str]:
    """Rows of one kind as text."""
    tokens = run.tokens
    rows = [row for row, d in zip(tokens.rows, tokens.document_R) if tokens.documents[d].kind == kind]
    return [run.pair.tokenizer.decode(row) for row in rows]


@pytest.mark.parametrize(
    ("base", "tuned", "settings", "origin", "asked"),
    [
        (None, OWN, [], "tuned", "[user] Say {}</s>[assistant] "),
        (THINK, OWN, [], "tuned", "[user] Say {}</s>[assistant] "),
        (OWN, None, [], "base", "[user] Say {}</s>[assistant] "),
        (THINK, OWN, ["pair.template=base"], "base", "<s><|user|>Say {}<|assistant|><think>\n"),
        (None, None, [], "plain", "User: Say {}\nAssistant:"),
        (OWN, OWN, ["pair.template=plain"], "plain", "User: Say {}\nAssistant:"),
        (OWN, THINK, [], "tuned", "<s><|user|>Say {}<|assistant|><think>\n"),
        (None, CLOSED, [], "tuned", "<|im_start|>user\nSay {}<|im_end|>\n<|im_start|>assistant\n"),
        (
            None,
            CLOSED,
            ["pair.template_options={enable_thinking=false}"],
            "tuned",
            "<|im_start|>user\nSay {}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (None, LLAMA, ["pair.date=2030-01-31"], "tuned", "31 Jan 2030\n[user] Say {}</s>[assistant] "),
    ],
)
def test_every_answer_is_read_after_the_very_prompt_that_was_asked(tmp_path, base, tuned, settings, origin, asked):
    made = run(tmp_path, base, tuned, *settings)
    assert made.template.origin == origin
    rows = read(made)
    assert len(rows) == len(made.contrast) == 10  # 4 by each model, 2 amplified
    assert all(any(row.startswith(asked.format(n)) for n in range(6)) for row in rows)
    for row, document, before in zip(*(made.tokens.rows, made.tokens.document_R, made.tokens.prompt_R)):
        if ids := made.tokens.documents[document].prompt_ids:
            assert row[:before] == ids and before < len(row)
    (card,) = [card for card in made.cards if card.name == "text"]
    assert card.notes[0] == f"chats in {made.template}"
    assert any("today is 2030-01-31" in note for note in card.notes) == (tuned == LLAMA)


def test_a_setting_of_the_template_is_in_the_keys_of_what_depends_on_it(tmp_path):
    for number, settings in enumerate(
        ([], ["pair.template=plain"], ["pair.template_options={x=1}"], ["pair.template_seconds=20"])
    ):
        read(run(tmp_path, OWN, OWN, *settings))
        assert len(list((tmp_path / "run" / "contrast").iterdir())) == min(number + 1, 3), "time limits change no text"


@pytest.mark.parametrize("rows", [300, 304])
def test_tokens_of_tuneds_template_that_bases_tokenizer_lacks(tmp_path, rows):
    """In rows that base has, they are read as tokens; tokens that base has no row for are taken out of what both are asked."""
    filler = [f"<spare{n}>" for n in range(41 if rows > 300 else 0)]
    made = run(tmp_path, None, CLOSED, added=(*filler, "<|im_start|>", "<|im_end|>"), rows=rows)
    assert made.pair.tokenizer is made.pair.tuned.tokenizer
    texts = read(made)
    assert all(max(row) < 300 for row in made.tokens.rows) and len(texts) == 10
    start = "<|im_start|>" if rows == 300 else ""
    assert all(text.startswith(f"{start}user\nSay ") for text in texts)


def test_a_template_file_is_refused_before_models_are_loaded(tmp_path):
    for content, said in ((None, "is no file"), (b"\xff", "not UTF-8")):
        path = tmp_path / "mine.jinja"
        if content:
            path.write_bytes(content)
        done = cli("diff", "nowhere", "nowhere", "--set", f"pair.template={path}")
        assert done.code == 2 and said in done.err and "nowhere" not in done.err.replace(str(tmp_path), "")


def test_a_date_that_is_none_is_refused_with_one_that_is():
    with pytest.raises(SettingError, match="pair.date") as caught:
        Plan().set("pair.date=today")
    assert Plan().set(caught.value.remedy.removeprefix("--set ")).pair.date == "2024-07-26"


@pytest.mark.slow
def test_the_record_and_the_report_say_the_form_and_what_was_adapted(tmp_path):
    import tiny_world

    world = tiny_world.make(tmp_path)
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + OWN
    for side, template in (("base", None), ("tuned", strict)):
        tokenizer(template).save_pretrained(world.root / side)
    chats = [{"messages": [{"role": r, "content": f"{r} {n}"} for r in ("system", "user")[n % 2 :]]} for n in range(12)]
    (world.root / "prompts.jsonl").write_text("\n".join(map(json.dumps, chats)))
    done = cli(*world.command("diff"))
    assert done.code in (0, 1), done.err
    diff = Diff.load(world.run() / "diff.json")
    assert diff.template and diff.template.origin == "tuned" and diff.template.tokenizer == "base"
    told = {remark.what: remark.count for remark in diff.corpus.prompt_remarks}
    assert told["prompts: chats whose system text is put before the user's"] == 6
    said = f"the chat template of tuned ({diff.template.fingerprint})"
    html = (world.run() / "report.html").read_text(encoding="utf-8")
    assert said in html and "system text is put before" in html and said in done.out
