"""CONTRIBUTING.md keeps its word: each file that it shows works out of tree, by the command that it shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = {name: body for body, name in re.findall(r"```python\n(# (mylab/\w+\.py)\n.*?)```", PAGE, re.DOTALL)}
COMMANDS = re.findall(r"^python -m tunediff (diff BASE TUNED .*)$", PAGE, re.MULTILINE)
TINY = {
    "contrast.prompts": 4,
    "elicit.questions": 0,
    "contrast.tokens": 6,
    "corpus.row_tokens": 48,
    "find.candidates": 3,
    "fit.steps": 20,
    "fit.batch": 256,
    "scan.depths": 2,
    "rank.nulls": 3,
    "rank.null_tokens": 200,
    "rank.effect_tokens": 300,
    "verify.draws": 5,
    "verify.changes": 2,
    "rank.level": 1.0,
    "verify.level": 0.9,
    "edit.tokens": 500,
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A folder outside the tree with the page's files, a pair of tiny models and a little text."""
    root = tmp_path_factory.mktemp("elsewhere")
    (root / "mylab").mkdir()
    for name, body in FILES.items():
        (root / name).write_text(body, encoding="utf-8")
    network = tiny_models.module("llama")
    tiny_models.save(root / "base", network)
    tiny_models.save(root / "tuned", tiny_models.tuned_copy(network, 0.05))
    texts = [{"text": "abcdABCDefgh"[n % 7 :] * 4 + str(n)} for n in range(40)]
    (root / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    chats = [{"messages": [{"role": "user", "content": "abcDABC"[n % 5 :] + str(n)}]} for n in range(12)]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return root


def told(lab: Path, *arguments: str) -> str:
    """What the command prints, run in the lab's folder by a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "tunediff", *arguments],
        cwd=lab,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("=")[1])
def test_a_file_of_the_page_works_out_of_tree(lab, command):
    verb, _, _, *options = shlex.split(command)
    tiny = {**TINY, "corpus.paths": ["corpus.jsonl"], "corpus.prompts": ["prompts.jsonl"]}
    sets = [x for k, v in tiny.items() for x in ("--set", f"{k}={json.dumps(v)}")]
    text = told(lab, verb, "base", "tuned", *sets, *options, "--json")
    (path,) = re.findall(r"mylab\.(\w+):", command)[:1]
    expected = {
        "finders": "loudest/0",
        "dictionaries": "crosscode/",
        "trials": "gap closed by half",
        "signals": "agreement",
        "families": "mylab.families:Explicit",
    }
    assert expected[path] in text


def test_the_organism_of_the_page_has_lessons(lab, monkeypatch):
    """Training it takes the real base model; what it teaches and how it is recognized does not."""
    from tunediff.lab import organisms

    monkeypatch.syspath_prepend(str(lab))
    organism = organisms.named("mylab.organisms:ORGANISM")
    examples = organism.examples({"Name a river.": "The Rhine."})
    assert organism.behaviors[0].rate([e.answer for e in examples if "start" in e.prompt]) == 1.0


def test_every_block_has_a_command():
    commands = re.findall(r"^python -m tunediff .*$", PAGE, re.MULTILINE)
    assert len(FILES) >= 6 and len(commands) == len(FILES)
    for name in FILES:
        assert any(name.removesuffix(".py").replace("/", ".") + ":" in command for command in commands), name
