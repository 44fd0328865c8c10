"""Random damage to everything that comes from elsewhere: never a fault, never silence, never a `found` that nobody asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import support_diffs
import tiny_world
from command_line import Told, cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_world import World

from tunediff.core.artifacts import plain

ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        3,
        2**70,
        1.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "\x1b[31m",
        "\udcff",
        "a" * 400,
    ]
    + [[], {}, [None], {"": None}, {"a": [1]}, "llama", "none", "resid.1", "os:abort", "../../etc", "{% for %}"]
)
"""What somebody's file may hold in place of what belongs there."""
BUDGET = dict(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
"""The same examples in every run."""


DEEP = "@deep@"
"""Stands for lists inside lists, deeper than any reader goes."""


@st.composite
def damage(draw) -> Callable[[bytes], bytes]:
    """A change of a file's bytes: of one value in its JSON, or of the bytes themselves."""
    kind = draw(st.sampled_from(["value", "value", "value", "drop", "add", "cut", "flip", "deep", "empty", "list"]))
    at, odd, many = draw(st.integers(0, 10_000)), draw(ODD), draw(st.integers(1, 3))

    def on_bytes(data: bytes) -> bytes:
        if kind == "cut":
            return data[: at % max(1, len(data))]
        if kind == "flip" and data:
            place = at % len(data)
            return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        if kind == "empty":
            return b""
        if kind == "list":
            return b"[" + data + b"]"
        try:
            root = json.loads(data)
        except ValueError:
            return data
        for number in range(many):
            places = list(_places(root))
            if places:
                parent, name = places[(at + 17 * number) % len(places)]
                if kind == "drop":
                    del parent[name]
                elif kind == "add" and isinstance(parent, dict):
                    parent["odd"] = odd
                else:
                    parent[name] = DEEP if kind == "deep" and number == 0 else odd
        text = json.dumps(root).replace(json.dumps(DEEP), "[" * 20_000 + "]" * 20_000)
        return text.encode("utf-8", "surrogatepass")

    return on_bytes


def _places(value: object):
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield value, name
        yield from _places(inner)


def ended_well(told: Told) -> None:
    assert told.code in (0, 2), told
    if told.code:
        assert "error: " in told.err or "Usage" in told.err, told
    else:
        assert told.out.strip(), told
    assert "Traceback" not in told.err and "\x1b" not in told.out + told.err


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return tiny_world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world) -> Path:
    """The folder of a whole run."""
    told = cli(*world.command("diff", **QUICK), "-q")
    assert told.code == 0, told.err
    return world.run()


QUICK = {"contrast__prompts": 0, "find__finders": ["mean_difference"], "find__signals": [], "verify__changes": 1}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = st.sampled_from(
    "base tuned seed pair.dtype pair.family corpus.paths corpus.tokens corpus.held_out_share contrast.temperature"
    " scan.sites scan.reach harvest.store harvest.abnormal find.finders find.dictionary find.crosscode.min_firings"
    " dictionary.latents dictionary.k_shared dictionary.masked fit.steps rank.level verify.doses verify.trials"
    " verify.patch.ceiling edit.strength runtime.device runtime.threads runtime nothing find.x.y".split()
)
VALUES = st.one_of(TEXTS, ODD.map(repr), st.floats().map(repr), st.integers().map(str), st.just("[" * 3000))


def no_zero(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\0", "")


@settings(max_examples=100, **BUDGET)
@given(name=NAMES, value=VALUES, more=TEXTS)
def test_settings(tmp_path_factory, name, value, more):
    runs = tmp_path_factory.getbasetemp() / "runs-of-settings"
    missing = str(runs / "no-such-model")
    ended_well(cli("harvest", missing, missing, "--runs", runs, "--set", no_zero(f"{name}={value}{more}"), "-q"))


@settings(max_examples=60, **BUDGET)
@given(change=damage(), field=NAMES, odd=ODD, at=st.integers(0, 3000))
def test_plans(tmp_path_factory, change, field, odd, at):
    from tunediff.runs.plan import Plan

    folder = tmp_path_factory.getbasetemp() / "runs-of-plans" / "r"
    folder.mkdir(parents=True, exist_ok=True)
    text = Plan(base="/no/such/base", tuned="/no/such/tuned").to_toml()
    lines = text.splitlines()
    place = at % len(lines)
    if " = " in lines[place]:
        lines[place] = f"{lines[place].partition(' = ')[0]} = {json.dumps(odd)}"
    else:
        lines.insert(place, f"{field} = {json.dumps(odd)}")
    (folder / "plan.toml").write_bytes(change("\n".join(lines).encode("utf-8", "surrogatepass")))
    for arguments in (
        ["revert", folder, "--set", "base=/no/such/base"],
        ["diff", "/no/such/base", "/no/such/tuned", "--plan", folder / "plan.toml"],
    ):
        told = cli(*arguments, "--runs", folder.parent.with_name("runs-of-no-plans"), "-q")
        ended_well(told)
        assert told.code == 2
    ended_well(cli("list", "--runs", folder.parent))


RECORD = json.dumps(plain(support_diffs.full_diff())).encode()


@settings(max_examples=50, **BUDGET)
@given(change=damage())
def test_findings_of_others(tmp_path_factory, change):
    record = tmp_path_factory.getbasetemp() / "foreign" / "r" / "diff.json"
    record.parent.mkdir(exist_ok=True, parents=True)
    record.write_bytes(change(RECORD))
    (record.parent / "plan.toml").write_text("")
    ended_well(cli("report", record))
    ended_well(cli("list", "--runs", record.parent.parent))


def harvested_with(world: World, source: Path, which: str, change: Callable[[bytes], bytes], runs: str) -> None:
    """A harvest of base against a copy of a model or adapter with one changed file ends well."""
    shutil.rmtree(world.root / "odd", ignore_errors=True)
    shutil.copytree(source, world.root / "odd")
    (world.odd / which).write_bytes(change((world.odd / which).read_bytes()))
    ended_well(cli(*world.command("harvest", "odd", runs=runs, **QUICK), "-q"))


@pytest.mark.slow
@settings(max_examples=14, **BUDGET)
@given(
    change=damage(), which=st.sampled_from(["config.json", "config.json", "tokenizer.json", "tokenizer_config.json"])
)
def test_models(world, change, which):
    harvested_with(world, world.tuned, which, change, "runs-of-models")


@pytest.mark.slow
@settings(max_examples=10, **BUDGET)
@given(
    change=damage(), which=st.sampled_from(["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"])
)
def test_adapters(world, change, which):
    harvested_with(world, world.adapter, which, change, "runs-of-adapters")


@pytest.mark.slow
@settings(max_examples=14, **BUDGET)
@given(change=damage(), at=st.integers(0, 1000))
def test_stages(world, finished, change, at):
    """A damaged file of a finished stage is made anew or named."""
    run = world.root / "damaged" / finished.name
    shutil.rmtree(run.parent, ignore_errors=True)
    shutil.copytree(finished, run)
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.name not in ("report.html", "diff.json"))
    path = files[at % len(files)]
    path.write_bytes(change(path.read_bytes()))
    ended_well(cli(*world.command("verify", runs="damaged", **QUICK), "-q"))
