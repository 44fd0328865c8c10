"""Plans: TOML both ways, one setting at a time, and every setting says what it does."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import shlex
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunediff import dictionaries
from tunediff.core import variants
from tunediff.core.errors import SettingError, TunediffError, VariantError
from tunediff.runs.plan import Plan, from_record, settled, to_record

PARTS = [f.name for f in dataclasses.fields(Plan) if dataclasses.is_dataclass(getattr(Plan(), f.name))]
KINDS = {type(getattr(Plan(), part)) for part in PARTS} | {
    variants.load("tunediff.dictionaries.architectures", name).Spec
    for name in variants.names("tunediff.dictionaries.architectures")
}


def test_defaults_name_real_parts():
    Plan().check()
    assert {
        "pair",
        "corpus",
        "contrast",
        "elicit",
        "scan",
        "harvest",
        "find",
        "fit",
        "rank",
        "verify",
        "edit",
        "runtime",
    } == set(PARTS)


def test_toml_gives_the_plan_back(tmp_path):
    plan = Plan(base="b", tuned="t", seed=7, dictionary={"latents": 64, "k_delta": 4.0})
    for text in ("verify.doses=[-1.0, 2]", "fit.steps=20", 'corpus.paths=["a.txt", "b c.md"]', "edit.spread=false"):
        plan = plan.set(text)
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml(), encoding="utf-8")
    assert Plan.read(path) == plan
    assert Plan.read(path).to_toml() == plan.to_toml()


def test_what_a_plan_leaves_out_keeps_its_default(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text("seed = 3\n[verify]\ndraws = 9\n")
    assert Plan.read(path) == Plan(seed=3).set("verify.draws=9")


@given(name=st.text())
def test_any_text_survives_toml_or_is_refused(tmp_path_factory, name):
    path = tmp_path_factory.getbasetemp() / "text.toml"
    path.write_bytes(Plan(base=name).to_toml().encode())
    assert Plan.read(path).base == name


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(SettingError, match="not text"):
        Plan(base="caf\udce9").to_toml()


@pytest.mark.parametrize(
    "text, part, field, value",
    [
        ("verify.draws=200", "verify", "draws", 200),
        ("rank.level=1", "rank", "level", 1.0),
        ("find.finders=principal", "find", "finders", ("principal",)),
        ('find.finders=["principal", "crosscode"]', "find", "finders", ("principal", "crosscode")),
        ("pair.allow_identical=true", "pair", "allow_identical", True),
        ("pair.dtype=bfloat16", "pair", "dtype", "bfloat16"),
        ("fit.steps=5", "fit", "steps", 5),
        ("corpus.kind=a = b", "corpus", "kind", "a = b"),
        ("verify.doses=[1]", "verify", "doses", (1.0,)),
        ("verify.doses=(1, 2)", "verify", "doses", (1.0, 2.0)),
        ("verify.doses=2", "verify", "doses", (2.0,)),
        ("verify.draws=1e4", "verify", "draws", 10_000),
        ("verify.draws=1_000", "verify", "draws", 1000),
        ("verify.draws = 7", "verify", "draws", 7),
        ("fit.steps=None", "fit", "steps", None),
        ("fit.steps=none", "fit", "steps", None),
        ("find.finders=['principal', \"crosscode\"]", "find", "finders", ("principal", "crosscode")),
        ("find.finders=('principal',)", "find", "finders", ("principal",)),
        ("pair.allow_identical=True", "pair", "allow_identical", True),
        ("pair.allow_identical=yes", "pair", "allow_identical", True),
        ("edit.spread=False", "edit", "spread", False),
        ("corpus.kind=2024", "corpus", "kind", "2024"),
        ("corpus.kind=true", "corpus", "kind", "true"),
        ("corpus.kind=a\nseed = 3", "corpus", "kind", "a\nseed = 3"),
    ],
)
def test_set_reads_values_as_the_field_has_them(text, part, field, value):
    got = getattr(getattr(Plan().set(text), part), field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["find.logit_gains.groups=3", "verify.steer.controls=3", "elicit.word_sweep.tries=3"])
def test_set_reaches_a_variants_own_table(text):
    part, name, setting = text.partition("=")[0].split(".")
    assert getattr(Plan().set(text), part).settings == {name: {setting: 3}}


@pytest.mark.parametrize(
    "text",
    [
        "rank.nulls=1",
        "rank.level=nan",
        "rank.level=2",
        "verify.draws=0",
        "verify.documents=0",
        "edit.tokens=0",
        "edit.ridge=-1",
        "scan.depths=0",
        "scan.reach=1.5",
        "contrast.batch=0",
        "contrast.temperature=-1",
        "runtime.threads=-1",
        "fit.batch=0",
        "harvest.store=int4",
        "dictionary.latents=-1",
        "dictionary.k_shared=x",
        "dictionary.k_shared=[1]",
        "dictionary.masked=3",
        "dictionary.latents=1.5",
        "dictionary.latents=true",
        "find.crosscode.min_firings=x",
        "find.decision_clusters.alike=[]",
        "elicit.word_sweep.forms=[]",
        "elicit.word_sweep.tries=x",
        "verify.steer.controls=many",
        "seed=-1",
        f"seed={2**70}",
        f"verify.draws={2**70}",
        f"verify.draws=1{'0' * 5000}",
        "rank.level=inf",
        "edit.strength=inf",
        "edit.strength=1e999",
        "harvest.abnormal=nan",
        "corpus.held_out_share=0",
        "corpus.held_out_share=1",
        "corpus.tokens=0",
        "corpus.row_tokens=0",
        "corpus.paths=",
        'corpus.prompts=["a", ""]',
        "base=",
        "find.candidates=0",
        "find.finders=[]",
        "find.finders=",
        "find.dictionary=",
        "pair.dtype=",
        "pair.dtype=float8",
        "runtime.device=xpu9",
        "runtime.threads=1e9",
        "scan.sites=mlp.1",
        "scan.sites=resid",
        "scan.sites=resid.-1",
        "scan.sites=",
        "scan.sites=resid.1.5",
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_runs(text):
    with pytest.raises((SettingError, VariantError)) as caught:
        settled(None, [text])
    assert caught.value.expected and len(caught.value.lines()) <= 4


def test_set_reaches_top_fields_and_the_dictionary():
    assert Plan().set("seed=3").seed == 3
    assert Plan().set("dictionary.latents=64").spec().latents == 64


@pytest.mark.parametrize(
    "text",
    [
        "verify.draws=many",
        "verify.draws=true",
        "verify.draws=1.5",
        "rank.level=[1]",
        "pair.allow_identical=1",
        "verify=3",
        "find.finders=[1]",
        "seed=x",
        "dictionary=3",
        "verify.draws",
    ],
)
def test_set_refuses_wrong_types(text):
    with pytest.raises(SettingError):
        Plan().set(text)


@pytest.mark.parametrize(
    "text, meant",
    [
        ("verify.drws=3", "verify.draws=3"),
        ("verfy.draws=3", "verify.draws=3"),
        ("verfy.drws=3", "verify.draws=3"),
        ("sed=1", "seed=1"),
        ("fit.step=3", "fit.steps=3"),
        ("verify.draws.more=1", "verify.draws=1"),
        ('find.finder=["principal", "nested"]', 'find.finders=["principal", "nested"]'),
    ],
)
def test_unknown_setting_names_the_nearest_as_it_is_typed(text, meant):
    with pytest.raises(SettingError) as caught:
        Plan().set(text)
    option, setting = shlex.split(caught.value.remedy)
    assert option == "--set" and setting == meant and Plan().set(setting) != Plan()
    assert len(caught.value.lines()) <= 4


def test_an_unknown_setting_like_no_other_has_no_remedy():
    with pytest.raises(SettingError) as caught:
        Plan().set("a.b.c.d=2")
    assert caught.value.expected and not caught.value.remedy


@pytest.mark.parametrize(
    "body, where",
    [
        ("[verify]\ndrws = 3\n", "verify.drws"),
        ("[verfy]\ndraws = 3\n", "verfy"),
        ("colour = 1\n", "colour"),
        ("[fit.deep]\nx = 1\n", "fit.deep"),
    ],
)
def test_unknown_key_in_a_file_is_named_with_its_path(tmp_path, body, where):
    path = tmp_path / "plan.toml"
    path.write_text(body)
    with pytest.raises(SettingError, match=where.replace(".", r"\.")):
        Plan.read(path)


@pytest.mark.parametrize("body", [b"[verify\n", b"x = \n", b"\xff\xfe", b"seed = 1\nseed = 2\n"])
def test_bad_toml_is_refused(tmp_path, body):
    path = tmp_path / "plan.toml"
    path.write_bytes(body)
    with pytest.raises(SettingError, match="not valid TOML"):
        Plan.read(path)


def test_a_missing_plan_is_refused(tmp_path):
    with pytest.raises(SettingError, match="does not exist"):
        Plan.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "text, error",
    [
        ("find.finders=crosscod", VariantError),
        ("find.signals=kl", VariantError),
        ("find.dictionary=nope", VariantError),
        ("dictionary.latens=3", SettingError),
        ("find.finders=no.such:Thing", VariantError),
        ("dictionary.latents=0", TunediffError),
    ],
)
def test_check_refuses_parts_that_are_not_there(text, error):
    with pytest.raises(error):
        Plan().set(text).check()


def test_records_go_both_ways():
    assert from_record(to_record(Plan())) == Plan()


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda k: k.__qualname__), ids=lambda k: k.__qualname__)
def test_every_setting_says_what_it_does(kind):
    """A docstring right under each field, as no tool checks it."""
    documented = set()
    for owner in kind.__mro__:
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for statement, after in zip(body, body[1:]):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                documented.add(statement.target.id)
    assert [f.name for f in dataclasses.fields(kind) if f.name not in documented] == []


def test_settings_are_frozen_and_have_one_default():
    for kind in KINDS:
        assert kind.__dataclass_params__.frozen
        kind()
    assert dictionaries.spec("delta") == Plan().spec()


def test_the_settings_page_is_up_to_date():
    """Made anew by ``python tools/make_settings_page.py``."""
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("make_settings_page", root / "tools" / "make_settings_page.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page()
