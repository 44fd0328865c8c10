"""The tuned lens: finds a planted map, knows the last layer, and reads the same when opened again."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from tunediff.core.errors import ArtifactError, NumericsError
from tunediff.harvests.lenses import Lens, fit_lens
from tunediff.models.network import LanguageModel
from tunediff.records.site import Site
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document


@pytest.fixture(scope="module")
def tokens():
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?"
    texts = ["".join(rng.choices(letters, k=rng.randint(20, 60))) for _ in range(120)]
    corpus = Corpus("letters", tuple(Document(f"d/{n}", "prose", text=t) for n, t in enumerate(texts)))
    return corpus.tokens(tiny_models.tokenizer(), row_tokens=64)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(tiny_models.module("llama"), tiny_models.tokenizer(), "llama")


@pytest.fixture(scope="module")
def lens(model, tokens, tmp_path_factory) -> Lens:
    return fit_lens(model, tokens, [Site(2), Site(0)], tmp_path_factory.mktemp("lens") / "l", batch_tokens=256)


class Planted:
    """A model whose final state is a known linear map of its stream, plus an offset and noise."""

    def __init__(self, noise: float = 0.0, width: int = 12):
        rng = torch.Generator().manual_seed(0)
        self.width, self.name = width, "planted"
        self.network = torch.nn.Linear(1, 1)
        self.family = SimpleNamespace(unembedding=lambda network: torch.nn.Linear(width, 1))
        self.embedding = torch.randn(300, 2, width, generator=rng)
        self.map_SDD = torch.randn(2, width, width, generator=rng)
        self.noise = noise * torch.randn(300, width, generator=rng)

    def streams_and_states(self, ids_BT, sites):
        y = self.embedding[ids_BT][..., 0, :] @ self.map_SDD[0].T + 3.0 + self.noise[ids_BT]
        return self.embedding[ids_BT][..., [0] * len(sites), :] + 5.0, y


def test_a_planted_map_is_recovered(tokens, tmp_path):
    planted = Planted()
    lens = fit_lens(planted, tokens, [Site(0)], tmp_path, ridge=1e-9, batch_tokens=256)
    torch.testing.assert_close(lens.map_SDD[0], planted.map_SDD[0], rtol=1e-4, atol=1e-4)
    assert lens.r2_S[0] > 0.9999


def test_noise_lowers_r2_to_what_is_left(tokens, tmp_path):
    """A state that is signal plus noise of a tenth of its variance is explained to about 90 %."""
    share = []
    for number, noise in enumerate((0.0, 1.1, 30.0)):
        share.append(
            float(fit_lens(Planted(noise), tokens, [Site(0)], tmp_path / str(number), batch_tokens=256).r2_S[0])
        )
    assert share[0] > 0.99 > share[1] > 0.8 and share[1] > share[2]


def test_at_the_last_block_it_is_nearly_the_final_norm(lens):
    assert lens.sites == (Site(0), Site(2)) and lens.map_SDD.shape == (2, 32, 32)
    assert lens.r2_S[1] > 0.9 and lens.r2_S[1] > lens.r2_S[0]


@pytest.mark.parametrize("token", [40, 99, 258])
def test_a_rows_direction_names_its_token(lens, model, token):
    rows = model.family.unembedding(model.network).weight
    direction = rows[token] - rows.mean(0)
    promoted, suppressed = lens.read(model, Site(2), direction, 5)
    assert promoted[0][0] == token and len(promoted) == len(suppressed) == 5
    assert promoted[0][1] > 0.8 and [w for _, w in promoted] == sorted((w for _, w in promoted), reverse=True)
    assert suppressed[0][1] < 0 and [w for _, w in suppressed] == sorted(w for _, w in suppressed)
    against, _ = promoted, suppressed
    flipped, now_suppressed = lens.read(model, Site(2), -direction, 5)
    assert now_suppressed[0][0] == token and flipped[0][0] == suppressed[0][0]
    scaled, _ = lens.read(model, Site(2), direction * 1000, 5)
    assert [t for t, _ in scaled] == [t for t, _ in against]


def test_a_mask_takes_tokens_out(lens, model):
    direction = model.family.unembedding(model.network).weight[40]
    mask = torch.ones(300, dtype=torch.bool)
    mask[40] = False
    promoted, suppressed = lens.read(model, Site(2), direction, 10, mask)
    assert 40 not in [t for t, _ in promoted + suppressed]
    only = torch.zeros(300, dtype=torch.bool)
    only[[7, 9, 40]] = True
    promoted, suppressed = lens.read(model, Site(2), direction, 10, only)
    assert {t for t, _ in promoted} == {t for t, _ in suppressed} == {7, 9, 40}, "what may not be named is not"
    assert len(lens.read(model, Site(2), direction, 1000)[0]) == 300


def test_saved_and_opened_it_reads_the_same(model, tokens, tmp_path, monkeypatch):
    first = fit_lens(model, tokens, [Site(1)], tmp_path, batch_tokens=256)
    monkeypatch.setattr(LanguageModel, "streams_and_states", None)
    again = fit_lens(model, tokens, [Site(1)], tmp_path, batch_tokens=256)
    assert again.sites == first.sites
    assert torch.equal(again.map_SDD, first.map_SDD) and torch.equal(again.r2_S, first.r2_S)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert first.read(model, Site(1), direction) == again.read(model, Site(1), direction)


def test_twice_the_same_bytes(model, tokens, tmp_path):
    for name in ("a", "b"):
        fit_lens(model, tokens, [Site(1)], tmp_path / name, batch_tokens=256)
    for file in ("lens.safetensors", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_models_lens_is_refused(model, tokens, tmp_path):
    fit_lens(model, tokens, [Site(1)], tmp_path, batch_tokens=256)
    other = LanguageModel(tiny_models.module("llama", 5), tiny_models.tokenizer(), "other")
    for which, sites, rest in ((other, [Site(1)], {}), (model, [Site(0)], {}), (model, [Site(1)], {"ridge": 0.5})):
        with pytest.raises(ArtifactError, match="other models, text, sites or settings") as caught:
            fit_lens(which, tokens, sites, tmp_path, batch_tokens=256, **rest)
        assert "delete" in caught.value.remedy


def test_a_base_keeps_its_lens_whatever_adapter_is_over_it(tmp_path, model, tokens):
    """The lens is of base alone, so one folder serves every adapter."""
    from peft import PeftModel

    first = fit_lens(model, tokens, [Site(1)], tmp_path / "lens", batch_tokens=256)
    network = tiny_models.module("llama")
    wrapped = PeftModel.from_pretrained(network, tiny_models.adapter(tmp_path / "a", network)).eval()
    base = LanguageModel(wrapped, tiny_models.tokenizer(), "base", wrapped.disable_adapter)
    assert torch.equal(fit_lens(base, tokens, [Site(1)], tmp_path / "lens", batch_tokens=256).map_SDD, first.map_SDD)


def test_held_out_documents_are_not_read(model, tokens, tmp_path, monkeypatch):
    read = []
    real = LanguageModel.streams_and_states

    def spy(self, ids_BT, sites):
        read.append(ids_BT)
        return real(self, ids_BT, sites)

    monkeypatch.setattr(LanguageModel, "streams_and_states", spy)
    fit_lens(model, tokens, [Site(1)], tmp_path, batch_tokens=256)
    assert sum(int((ids != 0).sum()) for ids in read) == tokens.select("train").count < tokens.count


def test_states_that_are_not_finite_are_refused(tokens, tmp_path):
    planted = Planted()
    planted.embedding[tokens.select("train").rows[0][0]] = float("nan")
    with pytest.raises(NumericsError, match="NaN or infinite"):
        fit_lens(planted, tokens, [Site(0)], tmp_path, batch_tokens=256)
    assert not list(tmp_path.iterdir())
