"""A network that went through a diff is the network it was, and a diff finds the same without acceleration."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import tiny_world
import torch
from torch import Tensor, nn

from tunediff.models.completing import complete
from tunediff.models.fingerprints import fingerprint
from tunediff.models.pair import Pair
from tunediff.models.passes import Start
from tunediff.records.site import Site
from tunediff.runs.plan import Plan, from_record, to_record
from tunediff.runs.run import Run

IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny_world.World:
    return tiny_world.make(tmp_path_factory.mktemp("world"))


def plan_of(world: tiny_world.World, tuned: str, **runtime: object) -> Plan:
    values = to_record(Plan(base=str(world.root / "base"), tuned=str(world.root / tuned)))
    for part, fields in {**tiny_world.parts(world), "runtime": runtime}.items():
        values[part] = {**values[part], **fields}
    return from_record(values)


def told(module: nn.Module) -> dict:
    """What anybody can see of a network besides its numbers."""
    configs = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    network = module.get_base_model() if hasattr(module, "get_base_model") else module
    home = __import__(type(network).__module__, fromlist=["x"])
    return {
        "classes": [(name, type(m)) for name, m in module.named_modules()],
        "attributes": [
            (name, sorted(k for k in vars(m) if not k.startswith("__"))) for name, m in module.named_modules()
        ],
        "forwards": [name for name, m in module.named_modules() if "forward" in vars(m)],
        "attention": [getattr(config, "_attn_implementation", None) for config in configs.values()],
        "switched off": [getattr(m, "_disable_adapters", None) for m in module.modules()],
        "trainable": [p.requires_grad for p in module.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
        "home": {name: id(value) for name, value in vars(home).items()},
        "precision": torch.get_float32_matmul_precision(),
    }


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=["tuned", "adapter"])
def used(request, world, tmp_path_factory) -> Iterator[tuple]:
    """A pair before and after a whole diff with a bill: what was told of both networks, their logits and fingerprints."""
    plan = plan_of(world, request.param)
    pair = Pair.load(plan.base, plan.tuned)
    modules = [pair.base.module, pair.tuned.module]
    before = [(told(m), logits(m), fingerprint(m)) for m in modules]
    run = Run(plan, tmp_path_factory.mktemp("run"), given=pair)
    verdicts = run.verdicts
    assert verdicts and run.signals is not None
    run.bill([verdicts[0].id])
    yield modules, before


def test_a_network_is_what_it_was(used):
    for module, (seen, said, hashed) in zip(*used):
        now = told(module)
        for what, value in seen.items():
            assert now[what] == value, what
        assert torch.equal(logits(module), said) and fingerprint(module) == hashed


def test_it_pickles_and_copies(used):
    for module, (seen, said, _) in zip(*used):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        for other in (read, copy.deepcopy(module)):
            assert torch.equal(logits(other), said)
            assert [type(m) for m in other.modules()] == [kind for _, kind in seen["classes"]]


def test_it_compiles(used):
    for module, (_, said, _) in zip(*used):
        try:
            compiled = torch.compile(module, backend="eager")
            found = logits(compiled)
        except (RuntimeError, ImportError) as error:
            pytest.skip(f"torch.compile is not to be had: {error}")
        torch.testing.assert_close(found, said)


def test_hooks_run(used):
    for module, (_, said, _) in zip(*used):
        seen: list[str] = []
        names = {m: name for name, m in module.named_modules() if name.endswith(("q_proj", "lora_B.default", "mlp"))}
        handles = [m.register_forward_hook(lambda m, given, out: seen.append(names[m])) for m in names]
        assert torch.equal(logits(module), said)
        for handle in handles:
            handle.remove()
        assert sorted(seen) == sorted(names.values())


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_the_verdicts_are_the_same_without_acceleration(world, tmp_path, tuned):
    found = []
    for fast in (True, False):
        run = Run(plan_of(world, tuned, fast=fast), tmp_path / str(fast))
        assert run.pair.base.fast == run.pair.tuned.fast == fast
        run.verdicts
        found.append(run)
    kept = [[(r.id, r.decision) for r in run.verdicts] for run in found]
    assert kept[0] == kept[1] and kept[0]
    assert [d.text for d in found[0].contrast] == [d.text for d in found[1].contrast]
    assert found[0].sites == found[1].sites


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_every_method_answers_the_same_without_acceleration(world, tuned):
    ids = torch.cat([IDS[:1, :9].expand(len(IDS), -1), IDS], 1)
    wanted = torch.arange(ids.shape[1]).expand(ids.shape) % 2 == 1
    site = Site(1)
    answers: list[list] = []
    for fast in (True, False):
        pair = Pair.load(str(world.root / "base"), str(world.root / tuned), fast=fast)
        with pair.running():
            both, first, second = pair.both_states(ids, [site]), pair.base, pair.tuned
            streams = second.streams(ids, [site, Site(0)])
            resumed = second.states(ids, Start(site, streams[:, :, 0]), wanted)[wanted]
            with second.writing(site, lambda stream: stream + 1):
                written = second.states(ids)
            null = pair.random_tuned(0)
            numbers = [*both, streams, resumed, written, null.states(ids), first.logits(first.states(ids))]
            prompts = [row[:n].tolist() for row, n in zip(ids, (12, 15, 26))]
            words = [
                complete(first, prompts, 5),
                complete(second, prompts, 5, temperature=0.7, seed=3),
                complete(second, prompts, 5, against=first, amplification=2.0),
            ]
        answers.append([numbers, words])
    for a, b in zip(answers[0][0], answers[1][0]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert answers[0][1] == answers[1][1]


def test_without_acceleration_nothing_is_touched_even_during_a_run(world):
    pair = Pair.load(str(world.root / "base"), str(world.root / "adapter"), fast=False)
    kinds, seen = [(type(m), "forward" in vars(m)) for m in pair.tuned.module.modules()], []
    pair.tuned.module.register_forward_pre_hook(lambda m, given: seen.append("wrapper"))
    handle = pair.tuned.blocks[0].register_forward_pre_hook(
        lambda m, given: seen.append([(type(x), "forward" in vars(x)) for x in pair.tuned.module.modules()])
    )
    with pair.running():
        pair.tuned.states(IDS), pair.base.states(IDS)
    handle.remove()
    assert seen == [kinds, kinds]
