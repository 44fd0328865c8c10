"""Nothing raw reaches a terminal: hostile names in every place, in a process of its own with real streams."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import tiny_world
from command_line import process
from safetensors.torch import load_file, save_file
from tiny_world import World

EVIL = "\x1b[31m\x1b]0;owned\x07\x9b31m\u202e[red]evil[/red]\u2066\r\nerror: x"
"""Steers a terminal by colors, its title, a C1 control, bidirectional marks, markup and a line of its own."""
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MANY = """
import json, sys
from tunediff.cli.main import main
for number, arguments in enumerate(json.loads(sys.argv[1])):
    sys.argv, code = ["tunediff", *arguments], 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    for stream in (sys.stdout, sys.stderr):
        print(f"== {number} ended with {code}", file=stream, flush=True)
"""
"""One process that runs many commands, since importing the libraries takes longest."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return tiny_world.make(tmp_path_factory.mktemp("world"))


def changed(world: World, name: str, file: str, change, source: str = "tuned") -> str:
    """A copy of a model whose JSON file was changed."""
    shutil.copytree(world.root / source, world.root / name)
    path = world.root / name / file
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return name


def with_weights(world: World, name: str, rename) -> str:
    shutil.copytree(world.tuned, world.root / name)
    path = world.root / name / "model.safetensors"
    save_file(rename(load_file(path)), path, metadata={"format": "pt"})
    return name


def many(*commands: list) -> tuple[subprocess.CompletedProcess, list[int]]:
    done = process(json.dumps([list(map(str, c)) for c in commands]), code=MANY)
    codes = [int(code) for code in re.findall(r"^== \d+ ended with (\d+)$", done.stderr, flags=re.M)]
    assert len(codes) == len(commands), done.stderr
    return done, codes


@pytest.mark.slow
def test_no_name_steers_a_terminal(world):
    spare = "model.layers.0.mlp.down_proj.weight"
    tunes = [
        with_weights(world, "more", lambda w: {**w, f"model.{EVIL}": w[spare].clone()}),
        with_weights(world, "less", lambda w: {k + EVIL * (k == spare): v for k, v in w.items()}),
        changed(world, "rope", "config.json", lambda c: c.update(rope_parameters={"rope_type": EVIL})),
        changed(world, "quant", "config.json", lambda c: c.update(quantization_config={"quant_method": EVIL})),
        changed(world, "type", "config.json", lambda c: c.update(model_type=EVIL)),
        changed(world, "act", "config.json", lambda c: c.update({EVIL: EVIL, "hidden_act": EVIL})),
        changed(world, "token", "tokenizer_config.json", lambda c: c.update({EVIL: EVIL, "tokenizer_class": EVIL})),
        changed(world, "name", "adapter_config.json", lambda c: c.update({EVIL: EVIL, "peft_type": EVIL}), "adapter"),
        changed(world, "maps", "adapter_config.json", lambda c: c.update(target_modules=[EVIL]), "adapter"),
    ]
    named = changed(world, f"[red]tune[/red]{EVIL}".replace("\n", " "), "config.json", lambda c: None)
    runs = f"runs-[bold]{EVIL}".replace("\n", " ")
    foreign = world.root / "foreign" / "evil"
    foreign.mkdir(parents=True)
    (foreign / "plan.toml").write_text(f"base = {json.dumps(EVIL)}\n{json.dumps(EVIL)} = 1\n")
    (foreign / "diff.json").write_text(json.dumps({"schema": EVIL, EVIL: EVIL}))
    other = world.root / "foreign" / "other"
    other.mkdir()
    (other / "plan.toml").write_text(f"base = {json.dumps(EVIL)}\n")
    tiny = {"verify__changes": 1, "find__finders": ["mean_difference"], "contrast__prompts": 0}
    done, codes = many(
        *([*world.command("harvest", tune, **tiny)] for tune in tunes),
        world.command("diff", named, runs=runs, **tiny),
        ["list", "--runs", world.root / runs],
        ["list", "--runs", world.root / runs, "--json"],
        ["report", "evil", "--runs", world.root / "foreign"],
        ["revert", "evil", "--runs", world.root / "foreign"],
        ["revert", "other", "--runs", world.root / "foreign"],
        ["list", "--runs", world.root / "foreign"],
        ["list", "--runs", world.root / "foreign", "--json"],
        ["diff", EVIL],
        ["diff", EVIL, EVIL, "--run", EVIL],
        ["diff", EVIL, EVIL],
        ["diff", "default", "demo", "--set", f"{EVIL}=1"],
        ["diff", "default", "demo", "--set", f"find.finders={EVIL}"],
        ["diff", "default", "demo", "--plan", EVIL],
        ["diff", "default", "demo", f"--{EVIL}"],
        [EVIL],
        ["organism", "check", EVIL, EVIL],
        ["bench", "--only", EVIL],
        ["bench", "--seeds", EVIL],
        ["floor", EVIL, "--methods", EVIL],
        ["calibrate", EVIL, "--count", EVIL],
    )
    assert not RAW.search(done.stdout), RAW.search(done.stdout)
    assert not RAW.search(done.stderr), [line for line in done.stderr.splitlines() if RAW.search(line)]
    assert set(codes) <= {0, 2}, done.stderr
    assert codes[9:12] == [0, 0, 0] and "Traceback" not in done.stderr, done.stderr
    rows = json.loads(done.stdout.split("== 10 ended with 0\n")[1].split("== 11")[0])
    assert rows[0]["tuned"].endswith(named)  # escaped in JSON, not changed


def test_a_style_of_another_library_and_a_rewritten_line_pass_as_text(capsys):
    from tunediff.core.streams import shown, terminal

    with shown():
        print("\x1b[1mbold\x1b[0m and \x1b]0;title\x07")
        print("\r50 %", file=sys.stderr)
        assert not sys.stdout.isatty() and terminal(sys.stdout) is sys.stdout
        with pytest.raises(TypeError):
            sys.stdout.write(b"raw")
        assert not hasattr(sys.stdout, "buffer")
    told = capsys.readouterr()
    assert told.out == "bold and ␛]0;title␇\n" and told.err == "50 %\n"


def test_json_is_escaped_and_still_the_same_value():
    from tunediff.core.artifacts import to_json
    from tunediff.core.text import escaped

    value = {EVIL: ["a\u0301\u0301\u0301\u0301\u0301\u0301b", "\U000e0041 \x7f\x85\u2028", "Café 東京 🙂"]}
    text = escaped(to_json(value, indent=1))
    assert json.loads(text) == value and not RAW.search(text) and "Café 東京 🙂" in text
