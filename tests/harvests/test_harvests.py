"""Harvests: the same tokens, near-exact on disk, the same bytes however often a run was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch

from tunediff import dictionaries
from tunediff.core import artifacts
from tunediff.core.artifacts import read_tensors
from tunediff.core.axes import BASE, TUNED
from tunediff.core.disk import hash_file
from tunediff.core.errors import ArtifactError, CorpusError, NumericsError, SettingError
from tunediff.core.manifests import is_finished
from tunediff.dictionaries.fitting import fit
from tunediff.dictionaries.schedule import FitSettings
from tunediff.harvests import harvest as harvests
from tunediff.harvests import stores
from tunediff.harvests.harvest import Harvest, HarvestSettings, harvest, noise_floor, repeated
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.records.site import Site
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document

SITES = [Site(1), Site(2)]
SMALL = HarvestSettings(batch_tokens=128, shard_tokens=256)
EXACT = HarvestSettings(store="float32", batch_tokens=128, shard_tokens=256)


def corpus(seed: int = 0, share: float = 0.25) -> Corpus:
    rng = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "one", "lazy", "dog", "and", "naps"]
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 12))) for _ in range(40)]
    return Corpus("tiny", tuple(Document(f"d/{n}", "prose", text=t) for n, t in enumerate(texts)), share)


def pair_of(base: torch.nn.Module, tuned: torch.nn.Module, names: tuple[str, str] = ("b" * 16, "t" * 16)) -> Pair:
    """A pair in memory, without the checks of loading."""
    tokenizer = tiny_models.tokenizer()
    sides = LanguageModel(base, tokenizer, "base"), LanguageModel(tuned, tokenizer, "tuned")
    return Pair(*sides, False, 300, *names)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


@pytest.fixture(scope="module")
def upper(tmp_path_factory) -> Pair:
    """An adapter of the uppermost block alone: the two below are shared."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("upper")
    tiny_models.save(root / "base", tiny_models.module("llama"))
    wrapped = get_peft_model(
        tiny_models.module("llama"), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[2])
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    wrapped.save_pretrained(root / "lora")
    return Pair.load(str(root / "base"), str(root / "lora"))


@pytest.fixture(scope="module")
def tokens():
    return make_tokens()


@pytest.fixture(scope="module")
def exact(pair, tokens, tmp_path_factory) -> Harvest:
    return harvest(pair, tokens, SITES, tmp_path_factory.mktemp("exact") / "h", EXACT)


def direct(pair: Pair, tokens, h: Harvest, numbers: torch.Tensor) -> torch.Tensor:
    """Streams (N, S, M, D) of tokens by number, each row run on its own."""
    found = {}
    for n in numbers.tolist():
        row = int(h.row_N[n])
        if row not in found:
            found[row] = pair.both_streams(torch.tensor([tokens.rows[row]]), h.sites)[0]
    return torch.stack([found[int(h.row_N[n])][int(h.position_N[n])] for n in numbers.tolist()])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted(folder.iterdir())}


# What is stored


def test_every_token_once_and_the_same_for_both(exact, tokens):
    assert len(exact.token_N) == tokens.count == exact.manifest["tokens"] and len(exact.shards) > 3
    seen = {}
    for n in range(len(exact.token_N)):
        row, position = int(exact.row_N[n]), int(exact.position_N[n])
        assert tokens.rows[row][position] == exact.token_N[n]
        assert tokens.document_R[row] == exact.document_N[n]
        seen[row, position] = n
    assert len(seen) == tokens.count


def test_streams_are_the_models_own(exact, pair, tokens):
    streams = exact.read("all", torch.arange(exact.count("all")))
    torch.testing.assert_close(streams, direct(pair, tokens, exact, exact.index("all")), rtol=1e-4, atol=1e-5)


def test_a_shards_streams_are_bit_equal_to_the_same_batch_run_again(exact, pair, tokens):
    batch = next(iter(tokens.batches(EXACT.batch_tokens)))
    streams = pair.both_streams(batch.ids_BT, SITES)[batch.mask_BT]
    assert torch.equal(exact.shards[0]["base"][: len(streams)], streams[:, :, BASE])
    assert torch.equal(exact.shards[0]["delta"][: len(streams)], streams[:, :, TUNED] - streams[:, :, BASE])


def test_int8_keeps_every_value_to_half_a_step_of_its_neighbors_scale(pair, tokens, exact, tmp_path):
    h = harvest(pair, tokens, SITES, tmp_path, HarvestSettings(store="int8", batch_tokens=128, shard_tokens=256))
    true, got = exact.at(exact.index("all")), h.at(h.index("all"))
    for true_NSD, got_NSD in (
        (true[:, :, BASE], got[:, :, BASE]),
        (true[:, :, TUNED] - true[:, :, BASE], got[:, :, TUNED] - got[:, :, BASE]),
    ):
        groups, error = (x.unflatten(-1, (-1, 32)) for x in (true_NSD, (got_NSD - true_NSD).abs()))
        step = groups.abs().amax(-1, keepdim=True) / 127
        assert (error <= 0.5 * (1 + 2**-6) * step + 4 * 2.0**-24 * true.abs().amax()).all()
        assert 1e-4 < float((got_NSD - true_NSD).norm() / true_NSD.norm()) < 1.5e-2
    size = {
        name: sum(path.stat().st_size for path in folder.glob("shard-*"))
        for name, folder in (("int8", tmp_path), ("exact", exact.folder))
    }
    assert size["int8"] < 0.5 * size["exact"]
    torch.testing.assert_close(
        torch.tensor(h.manifest["delta_energy"]), torch.tensor(exact.manifest["delta_energy"]), rtol=1e-2, atol=0
    )
    assert torch.equal(h.at(torch.tensor([3, 5])), h.at(torch.tensor([5, 3])).flip(0))


@pytest.mark.parametrize("store, unit", [("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_base_and_delta_are_kept_to_the_formats_precision(pair, tokens, exact, tmp_path, store, unit):
    """Half a unit in the last place of base and of delta each; float16 is absolute below 2^-14."""
    h = harvest(pair, tokens, SITES, tmp_path, HarvestSettings(store=store, batch_tokens=128, shard_tokens=256))
    true = exact.at(exact.index("all"))
    base, delta = true[:, :, BASE], true[:, :, TUNED] - true[:, :, BASE]
    got = h.at(h.index("all"))
    tiny = 2.0**-25 if store == "float16" else 0.0
    slack = 4 * 2.0**-24 * true.abs().amax(2)  # float32 arithmetic of the sums themselves
    assert ((got[:, :, BASE] - base).abs() <= unit * base.abs() + tiny + slack).all()
    error = (got[:, :, TUNED] - true[:, :, TUNED]).abs()
    assert (error <= unit * (base.abs() + delta.abs()) + 2 * tiny + slack).all()
    # The difference of the two is as good as delta itself, however small: that is why it is stored.
    kept = (got[:, :, TUNED] - got[:, :, BASE] - delta).norm() / delta.norm()
    assert kept < {"float32": 1e-6, "float16": 3e-4, "bfloat16": 2.5e-3}[store]


def test_shared_lower_blocks_give_what_full_runs_give(upper, tokens):
    assert upper.common_blocks == 2
    ids = next(iter(tokens.batches(256))).ids_BT
    both = upper.both_streams(ids, [Site(2)])
    assert torch.equal(both[..., 0, BASE, :], upper.base.streams(ids, [Site(2)])[:, :, 0])
    assert torch.equal(both[..., 0, TUNED, :], upper.tuned.streams(ids, [Site(2)])[:, :, 0])
    assert not torch.equal(both[..., BASE, :], both[..., TUNED, :])
    below = upper.both_streams(ids, [Site(0), Site(1), Site(2)])  # now the lower blocks are asked for too
    assert torch.equal(below[:, :, :2, BASE], below[:, :, :2, TUNED])
    assert torch.equal(below[:, :, 2:], both)
    parts = upper.both_streams(ids, [Site(2, "mlp"), Site(2)])
    assert torch.equal(parts[:, :, 1:], both)


def test_readers_agree(exact):
    for split in ("train", "held_out", "all"):
        index = exact.index(split)
        assert exact.count(split) == len(index) == len(exact.documents(split))
        whole = exact.at(index)
        shuffled = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
        assert torch.equal(exact.read(split, shuffled), whole[shuffled])
        chunks = list(exact.chunks(split, 37))
        assert torch.equal(torch.cat([numbers for numbers, _ in chunks]), index)
        assert torch.equal(torch.cat([streams for _, streams in chunks]), whole)
        assert torch.equal(exact.documents(split), exact.document_N[index])
    assert exact.at(torch.tensor([], dtype=torch.long)).shape == (0, 2, 2, 32)


def test_no_held_out_token_is_in_train(exact, tokens):
    train, held = (set(exact.documents(split).tolist()) for split in ("train", "held_out"))
    assert train and held and not train & held
    assert not any(tokens.held_out[d] for d in train) and all(tokens.held_out[d] for d in held)
    assert exact.count("train") + exact.count("held_out") == exact.count("all")


def test_energies_are_those_of_the_tokens_kept(exact):
    streams = exact.at(exact.index("all")).double()
    delta = streams[:, :, TUNED] - streams[:, :, BASE]
    for name, energy in (("base", streams[:, :, BASE]), ("delta", delta)):
        expected = energy.pow(2).sum(-1).mean(0).tolist()
        assert exact.manifest[f"{name}_energy"] == pytest.approx(expected, rel=1e-5)


def test_abnormal_tokens_are_set_apart_and_counted(pair, tokens, tmp_path, exact):
    norms = exact.at(torch.arange(len(exact.token_N))).norm(dim=-1)
    median = torch.tensor(exact.manifest["median_norm"])
    limit = 1.2
    h = harvest(
        pair,
        tokens,
        SITES,
        tmp_path,
        HarvestSettings(store="float32", abnormal=limit, batch_tokens=128, shard_tokens=256),
    )
    expected = (norms <= limit * median).all(-1).all(-1)
    assert 0 < (~expected).sum() < len(expected)
    assert torch.equal(h.ordinary_N, expected)
    assert torch.equal(h.kept_N, expected & (h.position_N >= torch.tensor(repeated(tokens))[h.row_N]))
    assert h.manifest["set_apart"] == int((~expected).sum())
    assert h.manifest["set_apart_first_position"] == int((~expected & (h.position_N == 0)).sum())
    assert h.count("all") == int(expected.sum()) - h.manifest["repeats"] and h.kept_N[h.index("train")].all()


def test_the_noise_floor_is_far_below_the_difference(exact, pair):
    noise, delta = exact.manifest["noise"], exact.manifest["delta_energy"]
    assert len(noise) == 2 and all(0 <= n < 1e-6 * d for n, d in zip(noise, delta))
    ids = torch.full((3, 9), 7)
    assert noise_floor(pair.base, ids, torch.ones(3, 9, dtype=torch.bool), SITES).shape == (2,)


# Runs that end early


CHILD = """
import sys, time
sys.path[:0] = [{tests!r}, {tests!r} + "/harvests"]
import torch
torch.set_num_threads({threads})
import test_harvests as t
def progress(done, total):
    print(done, flush=True)
    time.sleep(60)
t.harvest(t.make_pair(), t.make_tokens(), t.SITES, t.Path({folder!r}), t.SMALL, progress)
"""


def make_pair() -> Pair:
    """The pair of the `pair` fixture, for a process of its own."""
    network = tiny_models.module("llama")
    return pair_of(network, tiny_models.tuned_copy(network))


def make_tokens():
    return corpus().tokens(tiny_models.tokenizer(), row_tokens=32)


def test_a_killed_run_resumes_to_the_same_bytes(pair, tokens, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = CHILD.format(tests=str(Path(__file__).parents[1]), folder=str(killed), threads=torch.get_num_threads())
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert int(process.stdout.readline()) > 0  # one shard is done, and it now sleeps before the next
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert sorted(path.name for path in killed.iterdir()) == ["shard-00000.safetensors", "work.json"]
    first = (killed / "shard-00000.safetensors").stat().st_mtime_ns
    harvest(pair, tokens, SITES, killed, SMALL)
    harvest(pair, tokens, SITES, whole, SMALL)
    assert hashes(killed) == hashes(whole)
    assert (killed / "shard-00000.safetensors").stat().st_mtime_ns == first, "what was done is not done again"


def test_a_run_stopped_between_any_two_shards_resumes(pair, tokens, tmp_path):
    harvest(pair, tokens, SITES, tmp_path / "whole", SMALL)
    expected = hashes(tmp_path / "whole")

    class Stop(Exception):
        pass

    calls = 0
    while not is_finished(tmp_path / "stopped") and calls < 50:
        calls += 1
        limit = calls

        def progress(done: int, total: int, seen: list = []) -> None:  # noqa: B006
            seen.append(done)
            if len(seen) % limit == 0 and done < total:
                raise Stop

        try:
            harvest(pair, tokens, SITES, tmp_path / "stopped", SMALL, progress)
        except Stop:
            continue
    assert calls > 2 and hashes(tmp_path / "stopped") == expected


def test_a_finished_run_is_skipped(pair, tokens, tmp_path, monkeypatch):
    first = harvest(pair, tokens, SITES, tmp_path, SMALL)
    before = hashes(tmp_path)
    artifacts.write_json(tmp_path / "work.json", {"key": first.fingerprint})  # as if killed before it was taken away
    monkeypatch.setattr(Pair, "both_streams", None)
    again = harvest(pair, tokens, list(reversed(SITES)), tmp_path, SMALL)
    assert again.fingerprint == first.fingerprint and hashes(tmp_path) == before


def test_progress_ends_at_all_tokens(pair, tokens, tmp_path):
    told = []
    harvest(pair, tokens, SITES, tmp_path, SMALL, lambda done, total: told.append((done, total)))
    assert told[-1] == (tokens.count, tokens.count) and told == sorted(told) and len(told) > 3


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_folder_of_other_work_is_refused(pair, tokens, tmp_path, state):
    harvest(pair, tokens, SITES, tmp_path, SMALL)
    if state == "unfinished":
        key = json.loads((tmp_path / "manifest.json").read_text())["key"]
        (tmp_path / "manifest.json").unlink()
        artifacts.write_json(tmp_path / "work.json", {"key": key})
    other = pair_of(pair.base.module, pair.tuned.module, ("b" * 16, "u" * 16))
    text = corpus(1).tokens(pair.tokenizer, row_tokens=32)
    for work in (
        (other, tokens, SITES, SMALL),
        (pair, text, SITES, SMALL),
        (pair, tokens, SITES[:1], SMALL),
        (pair, tokens, SITES, EXACT),
    ):
        with pytest.raises(ArtifactError, match="other models, text, sites or settings") as caught:
            harvest(*work[:3], tmp_path, work[3])
        assert str(tmp_path) in caught.value.what and "delete" in caught.value.remedy
    harvest(pair, tokens, SITES, tmp_path, SMALL)


# What is damaged, full or not finite


def test_damaged_shards_are_told(pair, tokens, tmp_path):
    h = harvest(pair, tokens, SITES, tmp_path, SMALL)
    shard = tmp_path / h.manifest["shards"][1]
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for damaged in (flipped, whole[: len(whole) // 2]):
        shard.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="changed") as caught:
            Harvest.open(tmp_path)
        assert shard.name in caught.value.what and "delete" in caught.value.remedy
    shard.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        Harvest.open(tmp_path)


def test_a_damaged_shard_is_made_again_and_the_others_are_kept(pair, tokens, tmp_path, capsys):
    h = harvest(pair, tokens, SITES, tmp_path, SMALL)
    before, shard = hashes(tmp_path), tmp_path / h.manifest["shards"][1]
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    flipped = bytearray(shard.read_bytes())
    flipped[-3] ^= 1
    shard.write_bytes(flipped)
    again = harvest(pair, tokens, SITES, tmp_path, SMALL)
    assert f"{shard} is changed: it is made again" in capsys.readouterr().err
    assert hashes(tmp_path) == before and torch.equal(again.at(again.index("all")), h.at(h.index("all")))
    anew = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != made[path.name]}
    assert anew == {shard.name, "manifest.json"}


def test_a_shard_of_other_work_in_an_unfinished_harvest_is_not_believed(pair, tokens, tmp_path):
    harvest(pair, tokens, SITES, tmp_path / "whole", SMALL)
    other = pair_of(pair.tuned.module, pair.base.module, ("b" * 16, "u" * 16))
    theirs = harvest(other, tokens, SITES, tmp_path / "other", SMALL)
    (tmp_path / "begun").mkdir()
    for shard in theirs.manifest["shards"]:
        (tmp_path / "begun" / shard).write_bytes((theirs.folder / shard).read_bytes())
    harvest(pair, tokens, SITES, tmp_path / "begun", SMALL)
    assert hashes(tmp_path / "begun") == hashes(tmp_path / "whole")


def test_a_folder_that_is_no_harvest_is_told(tmp_path):
    with pytest.raises(ArtifactError, match="not a finished"):
        Harvest.open(tmp_path)


def test_a_full_disk_has_its_sentence_and_the_run_resumes(pair, tokens, tmp_path, monkeypatch):
    harvest(pair, tokens, SITES, tmp_path / "whole", SMALL)
    real, calls = os.fsync, []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="could not be written") as caught:
            harvest(pair, tokens, SITES, tmp_path / "full", SMALL)
    assert "No space left" in caught.value.got and "bytes" in caught.value.expected and "free" in caught.value.remedy
    assert not list((tmp_path / "full").glob(".*")), "nothing half written is left"
    harvest(pair, tokens, SITES, tmp_path / "full", SMALL)
    assert hashes(tmp_path / "full") == hashes(tmp_path / "whole")


def test_a_really_full_disk(pair, tokens, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(ArtifactError, match="could not be written") as caught:
            harvest(pair, tokens, SITES, disk / "h", EXACT)
        assert caught.value.remedy
        left = sorted(path.name for path in (disk / "h").iterdir())
        assert left[0].startswith("shard-00000") and left[-1] == "work.json"
    finally:
        for _ in range(20):  # what is memory-mapped may linger a moment
            if subprocess.run(["umount", str(disk)], capture_output=True).returncode == 0:
                break
            time.sleep(0.05)
        else:
            subprocess.run(["umount", "-l", str(disk)], capture_output=True)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_streams_that_are_not_finite_are_refused(pair, tokens, tmp_path, side, monkeypatch):
    network = tiny_models.module("llama")
    broken = tiny_models.module("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokens.rows[5][2]] = float("inf")
    bad = pair_of(broken, network) if side == "base" else pair_of(network, broken)
    with pytest.raises(NumericsError, match=f"{side} holds NaN or infinite") as caught:
        harvest(bad, tokens, SITES, tmp_path, SMALL)
    assert "resid.1" in caught.value.got and "d/" in caught.value.got and "float32" in caught.value.remedy
    assert not list(tmp_path.glob("shard*"))


def test_streams_too_large_for_float16_are_stored_in_float32(tokens, tmp_path):
    network, large = tiny_models.module("llama"), tiny_models.module("llama")
    with torch.no_grad():
        large.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    for number, pair in enumerate((pair_of(large, network), pair_of(network, large))):
        half, whole = (
            harvest(pair, tokens, SITES, tmp_path / f"{store}-{number}", HarvestSettings(store=store, batch_tokens=128))
            for store in ("float16", "float32")
        )
        index = half.index("all")
        assert half.at(index).abs().max() > torch.finfo(torch.float16).max
        exact = whole.at(index)
        assert ((half.at(index) - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("share, what", [(0.0, "no held-out part"), (0.999, "whole corpus is held out")])
def test_a_corpus_with_an_empty_split_is_refused(pair, tmp_path, share, what):
    with pytest.raises(CorpusError, match=what) as caught:
        harvest(pair, corpus(share=share).tokens(pair.tokenizer, row_tokens=32), SITES, tmp_path / "h", SMALL)
    assert caught.value.remedy and not (tmp_path / "h").exists()


@pytest.mark.parametrize("wrong", [dict(store="int4"), dict(abnormal=1.0), dict(batch_tokens=0), dict(shard_tokens=0)])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError) as caught:
        HarvestSettings(**wrong)
    assert caught.value.expected


def test_shards_where_everything_is_abnormal(pair, tokens, tmp_path, monkeypatch):
    """A shard of which nothing is kept is still written and counted."""
    monkeypatch.setattr(harvests, "_calibrate", lambda *rest: (torch.zeros(2, 2), torch.zeros(2)))
    with pytest.raises(NumericsError, match="every token"):
        harvest(pair, tokens, SITES, tmp_path, SMALL)
    assert not read_tensors(tmp_path / "shard-00000.safetensors")["kept"].any()


# Without a disk


NONE = HarvestSettings(store="none", batch_tokens=128, shard_tokens=256)


@pytest.fixture(autouse=True)
def two_shards(pair, monkeypatch) -> None:
    """As much memory as two shards take."""
    monkeypatch.setattr(stores, "HELD_BYTES", 2 * 256 * len(SITES) * 2 * pair.base.width * 4)


@pytest.fixture
def runs(pair, monkeypatch) -> list[int]:
    """How many tokens each call of `both_streams` ran."""
    told, run = [], pair.both_streams
    monkeypatch.setattr(pair, "both_streams", lambda ids, *rest: told.append(int(rest[1].sum())) or run(ids, *rest))
    return told


def test_streams_that_are_run_again_are_those_that_a_disk_keeps(pair, tokens, exact, tmp_path):
    made = harvest(pair, tokens, SITES, tmp_path / "h", NONE)
    assert not any(set(read_tensors(path)) & {"base", "delta"} for path in (tmp_path / "h").glob("shard-*"))
    there = {(int(exact.row_N[n]), int(exact.position_N[n])): n for n in range(len(exact.token_N))}
    places = torch.tensor([there[int(made.row_N[n]), int(made.position_N[n])] for n in range(len(made.token_N))])
    assert sorted(places.tolist()) == list(range(len(exact.token_N))) != places.tolist(), (
        "shards mix rows of all lengths"
    )
    everyone = torch.arange(len(made.token_N))
    for opened in (made, harvest(pair, tokens, SITES, tmp_path / "h", NONE)):
        assert torch.equal(opened.at(everyone), exact.at(places))
        assert torch.equal(opened.kept_N, exact.kept_N[places])
        assert len(opened.shards.kept) == 2 < len(opened.shards)
    assert made.manifest["delta_energy"] == pytest.approx(exact.manifest["delta_energy"], rel=1e-12)
    with pytest.raises(ArtifactError, match="keeps no streams"):
        Harvest.open(tmp_path / "h")


def test_what_is_in_memory_is_not_run_again_and_an_epoch_runs_all_once(pair, tokens, tmp_path, runs, monkeypatch):
    with monkeypatch.context() as more:
        more.setattr(stores, "HELD_BYTES", 1 << 30)
        all_held = harvest(pair, tokens, SITES, tmp_path / "all", NONE)
    first = sum(runs)
    for _, _ in all_held.chunks("train", 37):
        pass
    assert sum(runs) == first, "what fits is run once"
    few = harvest(pair, tokens, SITES, tmp_path / "few", NONE)
    runs.clear()
    train_N = torch.arange(few.count("train"))
    order_N = few.order("train", train_N, torch.Generator().manual_seed(0))
    assert sorted(order_N.tolist()) == train_N.tolist() != order_N.tolist()
    for at in order_N.split(50):  # batches lie across the shards' borders
        few.read("train", at)
    assert sum(runs) <= tokens.count, "two shards at a time, each once"
    runs.clear()
    for at in torch.randperm(len(train_N), generator=torch.Generator().manual_seed(0)).split(50):
        few.read("train", at)
    assert sum(runs) > 3 * tokens.count, "any other order would run them again and again"


def test_a_fit_on_streams_run_again_has_the_same_bytes_each_time(pair, tokens, tmp_path):
    h = harvest(pair, tokens, SITES, tmp_path / "h", NONE)
    spec, settings = (
        dictionaries.spec("delta", latents=64, k_shared=2, k_delta=4),
        FitSettings(steps=30, batch=64, checkpoint_every=7),
    )

    class Killed(Exception):
        pass

    def dies(done: int, total: int, row: dict) -> None:
        if done >= 20 * 64:
            raise Killed

    whole = fit(spec, h, settings, tmp_path / "whole")
    with pytest.raises(Killed):
        fit(spec, h, replace(settings, log_every=20), tmp_path / "killed", dies)
    again = harvest(pair, tokens, SITES, tmp_path / "h", NONE)  # nothing of it in memory
    resumed = fit(spec, again, replace(settings, log_every=20), tmp_path / "killed")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.dictionary.state_dict().values(), resumed.dictionary.state_dict().values())
    )
    assert whole.quality.ev_delta > 0.3
