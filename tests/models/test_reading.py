"""What a network allows is measured on it: seeing ahead, leaving blocks out, padding, acceleration; the rest is refused."""

from __future__ import annotations

import os

import pytest
import tiny_architectures
import tiny_models
import torch
from tiny_architectures import Case
from torch import nn

from tunediff.core.errors import FamilyError, SourceError
from tunediff.models import kinds
from tunediff.models.completing import complete
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.passes import Form, Start
from tunediff.records.site import Site

IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))


def model(case: Case | str, **given) -> LanguageModel:
    network = tiny_architectures.network(Case(case) if isinstance(case, str) else case)
    return LanguageModel(network, tiny_models.tokenizer(), "tiny", **given)


def logits_of(model: LanguageModel) -> torch.Tensor:
    with model.run_context():
        return model.network(input_ids=IDS, use_cache=False).logits


def test_a_network_that_sees_ahead_is_refused_by_what_it_does():
    encoder = model(tiny_architectures.OTHERS["BertLMHeadModel, as an encoder"])
    with pytest.raises(FamilyError, match="see what is to their right") as caught:
        encoder.check_reading(IDS)
    assert caught.value.remedy and "decoder" in str(caught.value)
    model("bert").check_reading(IDS)  # the same class, made a decoder


def test_what_modules_say_of_being_causal_is_not_believed():
    causal = LanguageModel(tiny_models.module("llama"), tiny_models.tokenizer(), "llama")
    causal.network.elsewhere = nn.Linear(2, 2)
    causal.network.elsewhere.is_causal = False
    causal.check_reading(IDS)


@pytest.mark.parametrize("name", ["gemma3n_text", "deepseek_v4"])
def test_several_streams_are_read_as_a_wide_one(name):
    if name not in tiny_architectures.names():
        pytest.skip("this version of transformers has no such network")
    several = model(name)
    several.check_reading(IDS)
    assert several.width == 4 * tiny_architectures.WIDTH
    stream = several.streams(IDS, [Site(1)])
    assert stream.shape == (3, 17, 1, several.width)
    resumed = several.logits(several.states(IDS, Start(Site(1), stream[:, :, 0])))
    torch.testing.assert_close(resumed, logits_of(several), rtol=1e-4, atol=1e-4)
    with several.writing(Site(1), lambda stream_BTD: stream_BTD * 0.5):
        assert not torch.allclose(several.states(IDS), several.states(IDS, Start(Site(2), stream[:, :, 0])))


def test_where_blocks_need_lower_ones_these_run_and_the_stream_is_put_in_their_place():
    needy = model("gemma3n_text")  # its last layers take keys and values from lower ones
    needy.check_reading(IDS)
    assert not needy.resumes
    moved = needy.streams(IDS, [Site(0)])[:, :, 0] * 1.5
    with needy.writing(Site(0), lambda stream_BTD: moved):
        expected = needy.states(IDS)
    torch.testing.assert_close(needy.states(IDS, Start(Site(0), moved)), expected)
    assert not torch.allclose(expected, needy.states(IDS))


@pytest.mark.parametrize("name", ["mamba", "rwkv", "bamba"])
def test_networks_with_states_share_no_beginnings(name):
    stateful = model(name)
    stateful.check_reading(IDS)
    assert not stateful.shares_prefixes
    assert stateful.family.cache(stateful.network) is None


def test_prompts_of_one_length_go_together_where_padding_changes_answers():
    ignorant = model("rwkv")  # takes no attention mask
    ignorant.check_reading(IDS)
    assert not ignorant.pads and not ignorant.caches  # its states get mixed up in batches
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [30, 31, 32]]
    alone = [complete(ignorant, [prompt], 5)[0] for prompt in prompts]
    assert complete(ignorant, prompts, 5) == alone


@pytest.mark.skipif(os.environ.get("TUNEDIFF_FAST") == "0", reason="there is no acceleration")
def test_an_acceleration_that_is_not_exact_is_switched_off(monkeypatch):
    from tunediff.models.fast import attention

    plain = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *given, **named: (plain(*given, **named)[0] * 1.1, None))
    wrong = LanguageModel(tiny_models.module("llama"), tiny_models.tokenizer(), "llama")
    wrong.check_reading(IDS)
    assert not wrong.fast


def test_a_network_that_wants_more_than_tokens_is_refused(monkeypatch):
    network = tiny_models.module("llama")
    needs = LanguageModel(network, tiny_models.tokenizer(), "llama")

    def forward(input_ids, pixels, **named):
        raise AssertionError

    monkeypatch.setattr(network, "forward", forward)
    with pytest.raises(FamilyError, match="does not run on token ids alone") as caught:
        needs.check_reading(IDS)
    assert "pixels" in str(caught.value)


@pytest.mark.parametrize(
    "output, width, others",
    [
        (torch.zeros(2, 3, 4), 4, None),
        ((torch.zeros(2, 3, 4), None), 4, 1),
        (torch.zeros(2, 3, 5, 4), 20, None),
        ((torch.zeros(5, 2, 3, 4),), 20, 0),
    ],
)
def test_the_form_of_an_output_leads_to_its_stream_and_back(output, width, others):
    form = Form.of(output, 2, 3)
    assert (form.width, form.others) == (width, others)
    stream = torch.randn(2, 3, width)
    assert torch.equal(form.stream(form.output(stream)), stream)
    assert torch.equal(form.stream(form.replaced(output, stream)), stream)


@pytest.mark.parametrize("output", [None, torch.zeros(6, 4), torch.zeros(3, 2, 4), ("text",), ()])
def test_what_is_no_stream_has_no_form(output):
    assert Form.of(output, 2, 3) is None


def test_rows_are_as_long_as_networks_have_positions():
    from transformers import RobertaConfig

    few = LanguageModel(tiny_models.module("gpt2"), tiny_models.tokenizer(), "gpt2")
    assert few.positions == 128
    other = LanguageModel(tiny_models.tuned_copy(few.network), few.tokenizer, "other")
    pair = Pair.of(few, other)
    assert (pair.fitting("rows of text", 96), pair.notes) == (96, [])
    assert pair.fitting("rows of text", 200) == 128
    assert pair.notes == ["rows of text have at most 128 tokens instead of 200: the networks have no more positions"]
    roberta = model("roberta")
    assert isinstance(roberta.network.config, RobertaConfig)
    longest = int(roberta.positions)
    roberta.states(torch.full((1, longest), 5))
    with pytest.raises(Exception):  # noqa: B017, of whatever kind
        roberta.states(torch.full((1, longest + 1), 5))


REFUSED = {
    "T5Config": ({"architectures": ["T5ForConditionalGeneration"]}, "an encoder-decoder"),
    "BartConfig": ({"architectures": ["BartForConditionalGeneration"]}, "an encoder-decoder"),
    "BertConfig": ({"architectures": ["BertForMaskedLM"]}, "an encoder"),
    "LlamaConfig": ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier or reward model"),
    "Qwen2Config": ({"architectures": ["Qwen2ForRewardModel"]}, "a classifier or reward model"),
    "ViTConfig": ({"architectures": ["ViTForImageClassification"]}, "a network for images"),
    "DebertaV2Config": ({"architectures": ["DebertaV2ForMaskedLM"]}, "an encoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_decoder_is_refused_as_what_it_is(name):
    import transformers

    fields, what = REFUSED[name]
    with pytest.raises(SourceError, match=f"folder is {what}") as caught:
        kinds.reader(getattr(transformers, name)(**fields), "folder")
    assert caught.value.remedy


def test_a_wrapper_is_read_whole_and_its_user_told():
    import transformers

    auto, notes = kinds.reader(transformers.Qwen2VLConfig(), "folder")
    assert auto is transformers.AutoModelForImageTextToText
    assert "Qwen2VLForConditionalGeneration" in notes[0] and "text alone" in notes[0]
    assert kinds.reader(transformers.LlamaConfig(), "folder") == (transformers.AutoModelForCausalLM, [])


def test_a_network_with_too_few_positions_for_the_check_says_so():
    with pytest.raises(FamilyError, match="too few positions") as caught:
        model(Case("gpt2", fields=(("n_positions", 16),))).check_reading(IDS)
    assert "at least 20" in str(caught.value) and "got: 16" in str(caught.value)
