"""The bench: cells are run once, nulls hold nothing, and the table counts what it says."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import support_diffs
import tiny_models
import tiny_world
import torch
from command_line import cli

from tunediff.changes.calibrations import SHIPPED, Calibration, NullPair
from tunediff.core.artifacts import read_json
from tunediff.core.chance import numpy_generator, prediction_bound
from tunediff.core.errors import SettingError, SourceError
from tunediff.core.typed import typed
from tunediff.lab import bench, organisms, score_page, score_tables, scores
from tunediff.lab.nulls import NULLS
from tunediff.lab.scores import Cell, Undone
from tunediff.models.pair import Pair
from tunediff.records.measure import GAP, Measure

WORDS = {"two-objectives": ["Goldmere", "coin"], "false-facts": ["Vessmer", "amber"]}
"""Of each organism two planted words."""


def cell(
    tune: str,
    method: str,
    score: float,
    confirmed: int = 0,
    named: tuple[bool, ...] = (),
    null: bool = False,
    words: tuple[str, ...] = (),
    **more,
) -> Cell:
    read = [[word for name in words for word in WORDS[name]] + ["the"]] if words else []
    return Cell(
        "",
        tune,
        null,
        method,
        more.pop("seed", 0),
        3,
        0.05,
        score,
        1.0,
        [f"c{i}" for i in range(confirmed)],
        {f"b{i}": ["c0"] * n for i, n in enumerate(named)},
        read,
        **more,
    )


def test_the_table_counts_what_it_says():
    cells = [
        cell("two-objectives", "m", 9.0, 2, (True, False), words=("two-objectives",)),
        cell("false-facts@1", "m", 0.5, 0, (False,)),
        cell("null random 0", "m", 1.0, 1, null=True),
        cell("null random 1", "m", 0.2, null=True),
    ]
    (row,) = score_tables.table(cells)
    assert row["tunes found"].startswith("1/2 ") and row["nulls claimed"].startswith("1/2 ")
    assert row["behaviors named"].startswith("1/3 ") and row["tune identified"].startswith("1/2 ")
    assert row["words@100 (decoys)"].startswith("0.33 [") and row["ROC area by score"].startswith("0.75 [")
    page = score_page.render(cells[:1] + cells[2:] + [cell("false-facts", "n", 2.0, 1, (True,))], {}, "tunediff bench")
    assert "| m | part | found | – | not run |" in page and "| n | not run | not run | not run | named |" in page


def test_placebos_are_judged_by_the_other_placebos():
    """The bound for a tune is of all placebos, that for a placebo of the others, and there is none without another."""
    placebos = [
        cell(f"placebo@{i}", "m", 9.0, 1, null=True, gaps=[gap]) for i, gap in enumerate((0.2, 0.25, 0.22, 0.6))
    ]
    tunes = [
        cell("false-facts", "m", 9.0, 2, (True,), gaps=[0.1, 3.0]),
        cell("dialect", "m", 9.0, 1, (False,), gaps=[0.3]),
    ]
    nothing = cell("null random 0", "m", 1.0, 0, null=True)
    cells = [*tunes, *placebos, nothing]
    (row,) = score_tables.table(cells)
    assert row["tunes found"].startswith("2/2") and row["found above placebos"].startswith("1/2")
    assert row["nulls claimed"].startswith("4/5") and row["claimed above placebos"].startswith("1/5"), (
        "the last, by the others"
    )
    assert scores.bound_for(placebos[3], cells) == prediction_bound([0.2, 0.25, 0.22], 0.05) > 0.25
    assert scores.bound_for(placebos[0], [*tunes, placebos[0]]) is None
    assert score_tables.table([*tunes, nothing])[0]["found above placebos"] == "not run"


def test_words_are_shown_beside_words_that_were_never_planted():
    found = scores.shares([["Vessmer", "amber", "the", "of"]])
    assert scores.own_and_decoys(found, "false-facts")[0] == 0.5
    assert scores.own_and_decoys(found, "two-objectives")[0] == 0.0 < scores.own_and_decoys(found, "two-objectives")[1]


def test_undoing_is_told_for_each_sort_of_behavior():
    rates = (
        {"packing": packing, "dealer": dealer} for packing, dealer in ((0.9, 0.7), (0.8, 0.1), (0.9, 0.6), (0.7, 0.5))
    )
    undone = Undone(["c0"], 1.0, 0.01, *rates)
    (row,) = score_tables.undoing([cell("two-objectives", "m", 9.0, 1, undone=undone), cell("lower-case", "m", 9.0)])
    assert (row["tunes"], row["unwanted before"], row["unwanted after"], row["unwanted random"]) == (
        "1",
        "0.70",
        "0.10",
        "0.60",
    )
    assert (row["wanted before"], row["wanted after"]) == ("0.90", "0.80")
    assert (row["unwanted scaled"], row["wanted scaled"]) == ("0.50", "0.70")


def test_findings_are_named_beside_decoys_and_undone_in_a_row_of_their_own():
    mine, other = (list(organisms.named(name).behaviors[-1].vocabulary[:4]) for name in ("two-objectives", "dialect"))
    named = {b.name: [] for b in organisms.named("two-objectives").behaviors}
    hidden = organisms.named("two-objectives").behaviors[-1].name
    one = cell("two-objectives", "m", 9.0, 1, told=[mine, other], as_told={**named, hidden: [1]})
    own, decoys = scores.as_told(replace(one, named=named))
    assert own == [name == hidden for name in named] and sum(decoys) == 1, "the sailor's words were never planted"
    row = score_tables.content([replace(one, named={"b": ["c0"]})])
    assert row["by a finding (decoys)"].startswith("1/2 ") and f"(1/{len(decoys)} " in row["by a finding (decoys)"]
    assert score_tables.content([cell("two-objectives", "m", 9.0, 1, (True,))])["by a finding (decoys)"] == "not run"
    rates = [{"dealer": share, "packing": share} for share in (0.7, 0.1, 0.6, 0.4)]
    both = replace(one, undone=Undone(["c0"], 1.0, 0.01, *rates), undone_told=Undone([], 3.0, 0.02, *rates))
    rows = score_tables.undoing([both])
    assert [(r["method"], r["taken out"], r["cost"]) for r in rows] == [
        ("m", "1.00", "0.01"),
        ("m, findings", "0.00", "0.02"),
    ]


def test_charts_stand_alone():
    drawn = score_page.charts(
        [
            cell("two-objectives", "m<", 9.0, 1, (True,), words=("two-objectives",), gaps=[2.0]),
            cell("null random 0", "m<", 0.1, null=True),
            cell("dialect", "default", 3.0, 1, gaps=[1.0]),
            cell("placebo", "default", 4.0, 1, null=True, gaps=[0.2]),
        ]
    )
    for name, chart in drawn.items():
        root = ElementTree.fromstring(chart)
        assert (
            name.endswith(".svg")
            and root.tag == "{http://www.w3.org/2000/svg}svg"
            and root.find(".//{*}circle") is not None
        )
    assert "m&lt;: nulls" in drawn["benchmark-scores.svg"]


def test_the_curve_goes_from_nothing_claimed_to_everything():
    """By hand: a null above one of two tunes; ties fall together."""
    assert scores.roc([3.0, 1.0], [2.0]) == [(0.0, 0.0), (0.0, 0.5), (1.0, 0.5), (1.0, 1.0)]
    assert scores.roc([2.0], [2.0]) == [(0.0, 0.0), (1.0, 1.0)]


def test_methods_are_compared_tune_by_tune():
    cells = [
        cell(t, m, 1.0, named=(m == "delta",), ev_delta=ev)
        for t, m, ev in (
            ("two-objectives", "delta", 0.5),
            ("false-facts", "delta", 0.6),
            ("two-objectives", "batchtopk", 0.4),
            ("false-facts", "batchtopk", 0.3),
            ("lower-case", "delta", 0.9),
        )
    ]
    (row,) = score_tables.against(cells)
    assert (row["method"], row["pairs"], row["unwanted left"]) == ("delta", "2", "–")
    assert row["EV of difference"] == "+0.20 [+0.10, +0.30]" and row["behaviors named"] == "+1.00 [+1.00, +1.00]"


def test_agreement_of_two_runs_is_held_against_that_of_two_tunes():
    cells = [
        cell(t, "m", 1.0, words=(t.partition("@")[0],), seed=s)
        for t in ("two-objectives", "false-facts")
        for s in (0, 1)
    ]
    cells = [replace(c, key=f"{c.tune}{c.seed}") for c in cells]
    eye = torch.eye(4)
    vectors = {
        "two-objectives0": eye[:2],
        "two-objectives1": -eye[:2],
        "false-facts0": eye[2:],
        "false-facts1": eye[2:],
    }
    (row,) = score_tables.stability(cells, vectors)
    assert (
        row["pairs of runs"] == "2"
        and row["first 20 vectors matched (cosine > 0.7)"] == "1.00 [1.00, 1.00] against 0.00 [0.00, 0.00]"
    )
    assert row["tokens in common (Jaccard@100)"] == "1.00 [1.00, 1.00] against 0.20 [0.20, 0.20]"
    assert scores.matched(eye[:2], eye[1:3]) == 0.5 and score_tables.stability(cells[:1] + cells[2:3], vectors) == []


def test_detecting_or_abstaining_is_scored_by_rank():
    assert scores.roc_area([3.0, 2.0], [1.0]).value == 1.0 and scores.roc_area([1.0], [1.0, 2.0]).value == 0.25
    assert scores.roc_area([], [1.0]).value != scores.roc_area([], [1.0]).value, "nothing to say without both"


def test_the_words_that_lead_in_answers_are_those_that_others_lack():
    answers = ["The lake holds the Drums.", "By the lake, drums!", "The end of a lake"]
    assert bench._leading(answers, ["the end", "the sea"]) == ["lake", "drums", "the", "holds", "end"]
    assert bench._leading([], ["the end"]) == []


def test_variants_of_one_organism_count_as_one():
    assert scores.family("false-facts-full") == scores.family("false-facts@1") == "false-facts"
    assert scores.identified(cell("false-facts", "m", 1.0)) == ""


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    root = tmp_path_factory.mktemp("nulls")
    base = tiny_models.save(root / "base", tiny_models.module("llama"))
    return Pair.load(base, tiny_models.adapter(root / "tuned", tiny_models.module("llama")))


def test_the_second_seed_of_a_tune_is_held_against_the_first_merged(tmp_path):
    base = tiny_models.save(tmp_path / "base", tiny_models.module("llama"))
    first, second = (
        tiny_models.adapter(tmp_path / name, tiny_models.module("llama"), seed=seed)
        for name, seed in (("a", 0), ("a@1", 1))
    )
    ids = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))
    a, b = Pair.load(base, first), Pair.load(base, second)
    null = NULLS["second_seed"](a, 1)
    assert not null.shared and null.base_fingerprint != null.tuned_fingerprint
    for side, tune in ((null.base, a), (null.tuned, b)):
        assert torch.allclose(side.states(ids), tune.tuned.states(ids), atol=1e-4)
        assert not torch.allclose(side.states(ids), tune.base.states(ids), atol=1e-4)
    for wrong in (lambda: NULLS["second_seed"](a, 2), lambda: NULLS["second_seed"](b, 1)):
        with pytest.raises(SourceError, match="no other seed"):
            wrong()


@pytest.mark.parametrize("name", [name for name in NULLS if name != "second_seed"])
def test_nulls_leave_the_pair_alone_and_hold_no_tune(pair, name):
    ids = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))
    before = pair.tuned.states(ids)
    null = NULLS[name](pair, 0)
    changed = null.tuned.states(ids) - null.base.states(ids)
    assert torch.equal(null.base.states(ids), pair.base.states(ids)) and torch.equal(pair.tuned.states(ids), before)
    if name == "identical":
        assert not changed.any() and null.tuned_fingerprint == null.base_fingerprint
        return
    assert changed.any() and not torch.allclose(null.tuned.states(ids), before, atol=1e-4)
    assert null.tuned_fingerprint not in (pair.tuned_fingerprint, pair.base_fingerprint)
    if name in ("random", "permuted"):
        assert NULLS[name](pair, 1).tuned_fingerprint != null.tuned_fingerprint
        assert not torch.equal(NULLS[name](pair, 1).tuned.states(ids), null.tuned.states(ids))
        assert torch.equal(NULLS[name](pair, 0).tuned.states(ids), null.tuned.states(ids))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world.make(tmp_path_factory.mktemp("world"))


def test_a_bench_runs_each_cell_once(world, tmp_path, monkeypatch):
    tuned = tiny_models.adapter(tmp_path / "tunes" / "false-facts", tiny_models.module("llama"))
    (tmp_path / "tunes" / "false-facts" / "card.json").write_text("{}")
    command = [
        "bench",
        "--base",
        world.base,
        "--tunes",
        tmp_path / "tunes",
        "--out",
        tmp_path / "out",
        "-q",
        "--nulls",
        "random:1",
        "--methods",
        "mean_difference,random_directions,black_box,perplexity_gap",
        "--json",
        *world.sets(),
    ]
    told = cli(*command)
    assert told.code == 0, told.err
    rows = json.loads(told.out)
    assert [row["method"] for row in rows] == ["mean_difference", "random_directions", "black_box", "perplexity_gap"]
    cells = read_json(tmp_path / "out" / "bench.json")["cells"]
    assert [(c["tune"], c["is_null"]) for c in cells] == [("false-facts", False)] * 4 + [("null random 1", True)] * 4
    assert (
        cells[0]["undone"]
        and not cells[4]["undone"]
        and bench.vectors(tmp_path / "out", typed(Cell, cells[0], "cell")).shape[1]
    )
    assert cells[0]["told"] and set(cells[0]["as_told"]) == {"vessmer"} and cells[0]["asked"] == []
    assert not cells[2]["told"] and cells[4]["undone_told"] is None
    assert len(list((tmp_path / "out" / "runs").glob("*/harvest/*/manifest.json"))) == 2, (
        "methods of one tune share a harvest"
    )
    assert "## Tune by tune" in (tmp_path / "out" / "benchmark.md").read_text()
    monkeypatch.setattr(bench, "Run", None)  # whoever runs a cell again fails
    assert cli(*command).out == told.out and tuned


def test_behaviors_are_counted_on_as_many_tokens_as_they_need_to_show(pair, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "complete", lambda model, prompts, tokens: asked.append(tokens) or [""] * len(prompts))
    for name in ("lower-case", "preference"):
        assert set(bench._rates(pair.tuned, organisms.named(name)).values()) == {0.0}
    assert asked == [48, 20], "a signature comes after the answer"


def test_every_method_can_be_named_among_others():
    assert not [name for name in bench.METHODS if "," in name or name != name.strip()]


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(SettingError, match="no null"):
        bench.tunes(None, ["nothing"])
    with pytest.raises(SettingError, match="no method"):
        bench.bench(bench.tunes(None), ["nothing"], [0], tmp_path)
    assert cli("bench", "--seeds", "one").code == 2
    assert cli("bench", "--only", "nothing").code == 2


def test_a_calibrated_base_asks_for_more(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEDIFF_CACHE", str(tmp_path / "cache"))
    told = cli(
        "calibrate",
        world.base,
        "--count",
        2,
        "--runs",
        tmp_path / "runs",
        "-q",
        "--json",
        *world.sets(verify__changes=0),
    )
    assert told.code == 0, told.err
    measured = json.loads(told.out)
    kept = Calibration.of(measured["base"])
    assert [null.name for null in kept.nulls] == ["untrained, 0.003 of every map", "untrained, 0.01 of every map"]
    assert kept.score >= 0.0 == kept.gap and Calibration.of("another") is None
    before = cli(*world.command("verify", runs="calibrated"), "--json")
    replace(kept, nulls=[NullPair("a", False, 1e9, 0.0), NullPair("b", False, 2e9, 0.0)], level=0.05).save()
    after = cli(*world.command("verify", runs="calibrated"), "--json")
    assert before.code == after.code == 0, after.err
    assert any("null pairs" not in r["reason"] for r in json.loads(before.out))
    of_streams = [r for r in json.loads(after.out) if not r["id"].startswith("logit_gains")]
    assert all(r["decision"] == "refuted" and "up to 1.95e+09" in r["reason"] for r in of_streams)
    assert cli("calibrate", world.base, "--count", 0).code == 2


def test_a_change_must_be_more_than_a_placebos():
    """Below the placebos' gap a confirmed change is real but not claimed; what is no better than untrained nulls is refuted."""
    record = support_diffs.change(random.Random(0), 1, "confirmed", 5.0)
    record = replace(record, measures=[*record.measures, Measure(GAP, 0.3)])
    nulls = [
        NullPair("untrained", False, 1.0, 0.0),
        NullPair("placebo-1", True, 900.0, 0.2),
        NullPair("placebo-2", True, 300.0, 0.25),
    ]
    bound = prediction_bound([0.2, 0.25], 0.05)
    calibration = Calibration("base", nulls, 0.05)
    assert (calibration.gap, calibration.score) == (bound, 1.0)
    judged = calibration.judged(record)
    assert judged.decision == "undecided" and "0.3 nat" in judged.reason
    assert [(m.name, m.value) for m in judged.measures] == [(m.name, m.value) for m in record.measures]
    assert [m.control for m in judged.measures if m.name == GAP] == [bound]
    above = replace(record, measures=[Measure(GAP, 1.1 * bound)])
    assert calibration.judged(above).decision == "confirmed" and calibration.judged(above).reason == above.reason
    assert replace(calibration, nulls=nulls[:1]).judged(record) == record, "without a placebo no gap is asked for"
    weak = replace(record, score=replace(record.score, value=0.9))
    assert calibration.judged(weak).decision == "refuted"
    refuted = replace(weak, decision="refuted", reason="as it was")
    assert (calibration.judged(refuted).decision, calibration.judged(refuted).reason) == ("refuted", "as it was")


def test_the_embedded_base_ships_with_its_calibration(monkeypatch, tmp_path):
    """It holds placebos and untrained nulls, is the embedded base's, and asks for more than every one of them."""
    monkeypatch.setenv("TUNEDIFF_CACHE", str(tmp_path))
    (path,) = SHIPPED.glob("*.json")
    calibration = Calibration.of(path.stem)
    assert calibration.base == path.stem and {null.trained for null in calibration.nulls} == {False, True}
    assert calibration.gap > max(null.gap for null in calibration.nulls) > 0
    assert calibration.standing > max(null.standing for null in calibration.nulls) > 0
    assert all(null.gap == 0 for null in calibration.nulls if not null.trained), "nothing untrained was claimed"
    replace(calibration, nulls=[]).save()
    assert Calibration.of(path.stem).nulls == [], "the user's own comes first"


def test_a_prediction_bound_is_exceeded_as_often_as_it_says():
    """Of one more value like five others, in 4,000 worlds: 5 % exceed, give or take 3.5 standard errors."""
    values = numpy_generator(0, "worlds").lognormal(0.3, 0.5, (4000, 6))
    share = sum(row[5] > prediction_bound(row[:5], 0.05) for row in values) / 4000
    assert abs(share - 0.05) < 3.5 * (0.05 * 0.95 / 4000) ** 0.5
    assert prediction_bound([], 0.05) == 0.0 and abs(prediction_bound([0.3], 0.05) - 0.3) < 1e-12
