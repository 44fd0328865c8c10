"""The ground and the waist: chance, artifacts, variants, sites, changes, and errors one can act on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bit_flips import flipped

from tunediff.core import artifacts, axes, chance, errors, variants
from tunediff.core.artifacts import key_of, plain, read_json, read_tensors, to_json
from tunediff.core.errors import ArtifactError, NumericsError, SettingError, TunediffError, VariantError

# Errors and axes


def test_an_error_says_what_expected_got_and_try():
    error = SettingError("x is 3", expected="x < 2", got="3", remedy="--set x=1")
    assert str(error).splitlines() == ["x is 3", "  expected: x < 2", "  got: 3", "  try: --set x=1"]
    assert SettingError("only this").lines() == ["only this"]


def test_every_error_is_in_the_tree():
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(kinds) > 8 and all(issubclass(kind, TunediffError) for kind in kinds)


def test_axes_are_checked():
    assert axes.check(torch.zeros(2, 3), "ND", D=3).shape == (2, 3)
    for wrong in (torch.zeros(2, 4), torch.zeros(3)):
        with pytest.raises(NumericsError, match=r"D=3"):
            axes.check(wrong, "ND", D=3)


# Chance


def test_streams_depend_on_seed_and_names_alone():
    one = torch.randn(4, generator=chance.generator(0, "a"))
    torch.randn(9, generator=chance.generator(0, "b"))
    chance.numpy_generator(0, "c").normal(size=5)
    assert torch.equal(one, torch.randn(4, generator=chance.generator(0, "a")))
    seeds = {chance.seed_of(s, *names) for s in (0, 1) for names in [("a",), ("b",), ("a", "b"), ("ab",), ("a", 0), ()]}
    assert len(seeds) == 12 and all(0 <= seed < 2**63 for seed in seeds)


def test_streams_are_the_same_in_every_process():
    code = "from tunediff.core.chance import seed_of; print(seed_of(3, 'x', 7))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "PYTHONHASHSEED": salt},
        ).stdout.strip()
        for salt in ("1", "2")
    }
    assert told == {str(chance.seed_of(3, "x", 7))}


def test_the_bootstrap_covers():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        sizes = rng.integers(5, 50, 40)
        sums = rng.normal(2.0, 1.0, 40) * sizes
        interval = chance.bootstrap_ratio(sums, sizes, seed=trial, draws=400)
        assert interval.low <= interval.value <= interval.high
        inside += interval.low <= 2.0 <= interval.high
    assert 0.88 <= inside / 200 <= 0.99


def test_the_bootstraps_agree_and_repeat():
    values = np.random.default_rng(1).normal(size=30)
    mean = chance.bootstrap_mean(values, seed=5)
    assert mean == chance.bootstrap_mean(values, seed=5) != chance.bootstrap_mean(values, seed=6)
    counts = chance.numpy_generator(5, "bootstrap").multinomial(30, np.full(30, 1 / 30), size=1000)
    by_hand = (values.mean(), *np.quantile(counts @ values / 30, [0.025, 0.975]), 0.95)
    np.testing.assert_allclose(dataclasses.astuple(mean), by_hand)
    narrow = chance.bootstrap_mean(values, seed=5, level=0.5)
    assert mean.low < narrow.low < narrow.high < mean.high


def test_one_document_tells_nothing_of_the_spread():
    interval = chance.bootstrap_mean([3.0], seed=0)
    assert (interval.value, interval.low, interval.high) == (3.0, -math.inf, math.inf)
    assert math.isnan(chance.bootstrap_ratio([1, 2], [0, 0], seed=0).value)


def test_p_values_count_the_statistic_itself():
    assert chance.p_value(5.0, [1, 2, 3]) == 1 / 4
    assert chance.p_value(2.0, [1, 2, 3]) == 3 / 4
    assert chance.p_value(0.0, []) == 1.0


def test_draws_end_once_enough_are_as_large():
    """By hand; and under the null it claims as often as it says at every level, to 3.5 standard errors, with a part of the draws."""
    assert chance.sequential_p(0.0, [1.0, -1.0, 2.0, 3.0], enough=2) == (2 / 3, [1.0, -1.0, 2.0])
    assert chance.sequential_p(9.0, [1.0, 2.0, 3.0], enough=2) == (0.25, [1.0, 2.0, 3.0])
    worlds = chance.numpy_generator(0, "sequential").normal(size=(4000, 101))
    found = [chance.sequential_p(row[0], iter(row[1:])) for row in worlds]
    for level in (0.01, 0.05, 0.2, 0.5):
        share = sum(p <= level for p, _ in found) / len(found)
        assert share <= level + 3.5 * (level * (1 - level) / len(found)) ** 0.5
        assert level != 0.05 or share > 0.8 * level, "not by never claiming"
    assert sum(len(drawn) for _, drawn in found) < 0.4 * 100 * len(found)
    for (p, _), row in zip(found, worlds):
        assert (p <= 0.05) == (chance.p_value(row[0], row[1:]) <= 0.05)


def test_p_values_are_uniform_under_the_null():
    rng = np.random.default_rng(0)
    drawn = [chance.p_value(rng.normal(), rng.normal(size=99)) for _ in range(500)]
    assert abs(np.mean(np.array(drawn) <= 0.1) - 0.1) < 0.04


# Artifacts


@dataclasses.dataclass(frozen=True)
class Setting:
    b: int = 2
    a: tuple = (1, 2.5)


def test_json_is_canonical():
    one = {"b": Setting(), "a": {3, 1, 2}, "ä": Path("x/y"), "n": float("nan"), "i": -math.inf, "t": torch.arange(3)}
    other = dict(reversed(one.items()))
    assert to_json(one) == to_json(other)
    assert json.loads(to_json(one)) == {
        "b": {"b": 2, "a": [1, 2.5]},
        "a": [1, 2, 3],
        "ä": "x/y",
        "n": None,
        "i": None,
        "t": [0, 1, 2],
    }
    assert "ä" in to_json(one)
    assert plain([torch.tensor(2.5), np.float32(1.5), np.int64(3), True, None]) == [2.5, 1.5, 3, True, None]


def test_keys_tell_values_apart():
    assert key_of(1, "a") == key_of(1, "a") and len(key_of(1)) == 16
    assert len({key_of(1, "a"), key_of("1", "a"), key_of([1, "a"]), key_of(Setting()), key_of(Setting(b=3))}) == 5


def test_a_later_setting_leaves_keys_as_they_were():
    """At its default; else it counts."""
    before = dataclasses.make_dataclass("Given", [("a", int, 1)])
    after = dataclasses.make_dataclass(
        "Given", [("a", int, 1), ("b", str, dataclasses.field(default="x", metadata=artifacts.LATER))]
    )
    assert key_of([before()]) == key_of([after()]) != key_of([after(b="y")])
    assert plain(after()) == {"a": 1, "b": "x"}


def test_damaged_json_and_tensors_are_told(tmp_path):
    for read in (read_json, read_tensors):
        with pytest.raises(ArtifactError, match="does not exist"):
            read(tmp_path / "absent")
        (tmp_path / "bad").write_bytes(b"\xff{")
        with pytest.raises(ArtifactError, match="is not"):
            read(tmp_path / "bad")


def test_a_sealed_record_is_read_as_it_was_written(tmp_path):
    """Whatever bit flips, it is told, or what is read stays the same; a record without a seal is read as it is."""
    path, value = tmp_path / "r.json", {"text": "é\n", "n": [1, 2.5, 1e-9, None], "deep": {"a": True}}
    artifacts.write_json(path, artifacts.sealed(value))
    assert read_json(path) == value
    for _ in flipped(path, 7):
        try:
            read = read_json(path)
        except ArtifactError as error:
            assert str(path) in error.what
        else:
            assert {name: read[name] for name in value} == value
    artifacts.write_json(path, value)
    assert read_json(path) == value


def test_tensors_come_back_whatever_their_layout(tmp_path):
    tensors = {"t": torch.randn(3, 4).T, "half": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0, 3)}
    artifacts.write_tensors(tmp_path / "t.safetensors", tensors, {"made": "here"})
    first = (tmp_path / "t.safetensors").read_bytes()
    back = read_tensors(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    artifacts.write_tensors(tmp_path / "t.safetensors", tensors, {"made": "here"})
    assert (tmp_path / "t.safetensors").read_bytes() == first


# Variants


def test_variants_are_the_files_of_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "somelab"
    folder.mkdir()
    for name in ("__init__", "base", "_hidden", "linear_probe", "lens"):
        (folder / f"{name}.py").write_text(f"VARIANT = {name!r}\nOTHER = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert variants.names("somelab") == ["lens", "linear_probe"]
    assert variants.load("somelab", "linear_probe") == variants.load("somelab", "linear-probe") == "linear_probe"
    assert variants.load("tunediff.models.families", "somelab.lens:OTHER") == 7


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(VariantError, match="'hugingface'") as caught:
        variants.load("tunediff.models.families", "hugingface")
    assert "huggingface" in caught.value.remedy and "huggingface" in caught.value.expected


@pytest.mark.parametrize("name", ["no_such_module_at_all:X", "tunediff.records.site:Nothing"])
def test_an_import_path_that_leads_nowhere_is_told(name):
    with pytest.raises(VariantError, match="cannot be imported") as caught:
        variants.load("tunediff.models.families", name)
    assert caught.value.expected == "module:attribute" and caught.value.got


def test_a_proportion_keeps_a_width_where_none_or_all_succeed():
    from scipy.stats import binomtest

    for successes, trials in ((0, 16), (16, 16), (3, 20), (11, 16)):
        interval = chance.proportion(successes, trials)
        judge = binomtest(successes, trials).proportion_ci(method="wilson")
        assert interval.low == pytest.approx(judge.low, abs=1e-6)
        assert interval.high == pytest.approx(judge.high, abs=1e-6)


def test_memory_stays_with_the_process_where_the_c_library_lets_it():
    script = """
import ctypes, resource, torch
from tunediff.core import pages
kept = pages.keep()
assert kept or not hasattr(ctypes.CDLL(None), "mallopt")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
a = torch.ones(9 << 20)
for _ in range(5):
    b = a + 1
    del b
before = faults()
for _ in range(20):
    b = a + 1
    del b
print(kept, faults() - before)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    pages_of_one = (9 << 20) * 4 // 4096  # a small allocation may move one making to fresh pages: never most of twenty
    assert told[0] == "False" or int(told[1]) < 10 * pages_of_one
