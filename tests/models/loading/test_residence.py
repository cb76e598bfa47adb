"""Networks that wait and come, on the CPU: the pictures are those of networks that lie there, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.base import Generation, GenerationParams, Lora, ModelSpec, Refiner, Step
from models.families import FAMILIES
from models.generation import LoadedModel
from models.loading.plan import Plan, Work, choose
from models.loading.residence import Residence, blocks_of

PARAMS = GenerationParams(
    prompt="a cat", negative_prompt="rain", width=64, height=64, steps=4, seeds=(3,), guidance_scale=3.5, preview=True
)
NAMES = ("sd15", "sdxl", "flux-dev")
PAIR = ("sdxl", "sdxl-refiner")
Build = Callable[[str], LoadedModel]


@pytest.fixture(scope="module")
def models(family_folders: dict[str, Path]) -> dict[str, LoadedModel]:
    return {
        name: LoadedModel(FAMILIES[name].load(ModelSpec(name=name, family=name, source=family_folders[name]), "cpu"))
        for name in (*NAMES, "sdxl-refiner")
    }


def strategy(name: str) -> CacheStrategy:
    return FirstBlockCache(threshold=1.0, max_consecutive=1) if name.startswith("flux") else DeepCache(interval=2)


def drawn(
    model: LoadedModel, cache: CacheStrategy, **changes: Any
) -> tuple[np.ndarray, list[bytes | None], Generation]:
    steps: list[Step] = []
    made = model.generate(replace(PARAMS, **changes), cache, steps.append)
    return np.stack([np.asarray(image) for image in made.images]), [step.preview for step in steps], made


@pytest.fixture
def housed(models: dict[str, LoadedModel]) -> Iterator[Callable[[str, Callable[[Residence], Plan]], LoadedModel]]:
    """The model of a family, its networks settled by a plan; as it was afterwards."""
    taken: dict[str, Residence] = {}

    def housed(name: str, plan: Callable[[Residence], Plan]) -> LoadedModel:
        model = models[name].model
        if name not in taken:
            networks = {key: part for key, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
            model.residence = taken[name] = Residence(networks, torch.device("cpu"))
        taken[name].settle(plan(taken[name]))
        return models[name]

    yield housed
    for name, residence in taken.items():
        residence.settle(Plan(offload="none"))
        models[name].model.residence = None


def in_turns(residence: Residence) -> Plan:
    return Plan(offload="model", moved=frozenset(residence.networks))


def by_blocks(kept: int) -> Callable[[Residence], Plan]:
    def plan(residence: Residence) -> Plan:
        sizes = residence.sizes
        moved = frozenset(residence.networks)
        return Plan(offload="group", moved=moved, kept={sizes.denoisers[0]: kept, **dict.fromkeys(sizes.texts, 0)})

    return plan


def without_texts(residence: Residence) -> Plan:
    return Plan(offload="text", moved=residence.sizes.texts)


PLANS = {"text": without_texts, "model": in_turns, "group": by_blocks(0), "group, some kept": by_blocks(3)}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_does_not_depend_on_where_the_networks_lie(
    models: dict[str, LoadedModel], housed: Any, name: str, plan: str
) -> None:
    whole = {cache.name: drawn(models[name], cache) for cache in (NoCache(), strategy(name))}
    model = housed(name, PLANS[plan])
    for cache in (NoCache(), strategy(name)):
        pixels, previews, made = drawn(model, cache)
        expected, expected_previews, plain = whole[cache.name]
        assert np.array_equal(pixels, expected)
        assert previews == expected_previews
        assert made.reports[0].decisions == plain.reports[0].decisions
        copied = [sentence for sentence in made.warnings if sentence not in plain.warnings]
        assert bool(copied) == plan.startswith("group")  # on the CPU nothing else has to be copied
    assert made.reports[0].reused > 0
    residence = model.model.residence
    assert residence is not None
    sizes = residence.sizes
    left = {"text": sizes.weights.keys() - sizes.texts}.get(plan, {"vae"})  # and no text encoder, which nobody needs
    assert residence.held == sum(sizes.weights[part] for part in left)


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_comes_along_and_leaves_no_trace(
    models: dict[str, LoadedModel], housed: Any, tmp_path: Path, name: str
) -> None:
    network = models[name].denoiser.root
    prefix = "transformer" if name.startswith("flux") else "unet"
    path = next(path for path, _ in network.named_modules() if path.endswith(("attn1.to_q", "attn.to_q")))
    rows, columns = network.get_submodule(path).weight.shape  # type: ignore[union-attr, misc]
    down, up = torch.randn(2, columns), torch.randn(rows, 2)
    tensors = {f"{prefix}.{path}.lora_A.weight": down, f"{prefix}.{path}.lora_B.weight": up}
    save_file(tensors, tmp_path / "style.safetensors")
    lora = Lora(name="style", path=tmp_path / "style.safetensors")
    expected, plain = drawn(models[name], NoCache(), loras=(lora,))[0], drawn(models[name], NoCache())[0]
    assert not np.array_equal(expected, plain)
    for plan in PLANS.values():
        model = housed(name, plan)
        assert np.array_equal(drawn(model, NoCache(), loras=(lora,))[0], expected)
        assert np.array_equal(drawn(model, NoCache())[0], plain)


def test_a_network_is_as_it_was_when_nothing_is_moved_any_more(models: dict[str, LoadedModel], housed: Any) -> None:
    model = housed("sd15", by_blocks(1))
    unet = model.denoiser.root
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    drawn(model, DeepCache())
    model.model.residence.settle(Plan(offload="none"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    assert not hasattr(unet, "_hf_hook")


def test_a_call_that_skips_blocks_copies_none(models: dict[str, LoadedModel], housed: Any) -> None:
    """Of three steps the second reuses; without the cache all compute."""
    copied = {}
    for cache in (NoCache(), strategy("flux-dev")):
        model = housed("flux-dev", by_blocks(1))
        residence = model.model.residence
        drawn(model, cache, steps=3, preview=False)
        before = residence.copied
        drawn(model, cache, steps=3, preview=False)
        copied[cache.name] = residence.copied - before
    away = residence.plan.copied_each_step(residence.sizes)
    assert away > 0
    assert copied["none"] - copied["first_block"] == pytest.approx(away, rel=0.35)


@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_blocks_stand_in_the_order_of_their_running(models: dict[str, LoadedModel], name: str) -> None:
    ran: list[nn.Module] = []
    blocks = blocks_of(models[name].denoiser.root)
    handles = [one.register_forward_pre_hook(lambda module, _: ran.append(module)) for one in blocks]
    drawn(models[name], NoCache(), steps=1, preview=False)
    for handle in handles:
        handle.remove()
    assert [id(one) for one in ran[: len(blocks)]] == [id(one) for one in blocks]


def test_a_request_that_needs_more_is_planned_anew_and_leaves_the_plan_as_it_was(
    models: dict[str, LoadedModel], housed: Callable[..., LoadedModel]
) -> None:
    model = housed("flux-dev", lambda residence: Plan(offload="none"))
    residence = model.model.residence
    assert residence is not None
    expected = drawn(model, NoCache())[0]
    weights = residence.held
    assert weights == sum(residence.sizes.weights.values())
    assert model.tighter(PARAMS, 10**12) is None  # it is the cheapest already
    work = model.model.work(64, 64, 1)
    least = Plan(offload="model", moved=frozenset(residence.networks)).need(residence.sizes, work)
    free = round(least / 0.95) + 1 - weights
    plan = model.tighter(PARAMS, free)
    assert plan is not None
    assert plan.moved
    with model.settled(plan):
        assert residence.held < weights
        assert model.working_bytes(PARAMS, 1) + residence.held == plan.need(residence.sizes, work) <= free + weights
        assert np.array_equal(drawn(model, NoCache())[0], expected)
    assert (residence.plan, residence.held) == (Plan(offload="none"), weights)
    assert model.tighter(PARAMS, -weights) is None  # there is nothing to put it in


@pytest.mark.parametrize("memory", [10**9, 0], ids=["enough", "too little"])
def test_two_models_share_a_device_while_one_refines_the_other(
    models: dict[str, LoadedModel], housed: Callable[..., LoadedModel], memory: int
) -> None:
    refined = replace(PARAMS, refiner=Refiner(model="sdxl-refiner", switch=0.5), preview=False)
    base, refiner = (models[name] for name in PAIR)
    with base.refined_by(refiner):
        expected = np.asarray(base.generate(refined, NoCache(), lambda step: None).images[0])
    for name, plan in zip(PAIR, (without_texts, in_turns), strict=True):
        housed(name, plan)
    alone = [one.model.residence for one in (base, refiner)]
    plans = [one.plan for one in alone if one is not None]
    base.model.memory = memory
    with base.refined_by(refiner):
        joint = base.model.residence
        assert joint is not None
        assert joint is refiner.model.residence
        assert joint.sizes.denoisers == ("unet", "refiner_unet")
        assert joint.sizes.texts == {"text_encoder", "text_encoder_2", "refiner_text_encoder_2"}
        assert (joint.plan.offload, joint.plan.kept != {}) == (("none", False) if memory else ("group", True))
        made = base.generate(refined, NoCache(), lambda step: None)
        assert np.array_equal(np.asarray(made.images[0]), expected)
        work = base.model.work(64, 64, 1).beside(refiner.model.work(64, 64, 1))
        if joint.plan.moved:
            assert base.working_bytes(refined, 1) + joint.held == joint.plan.need(joint.sizes, work)
    base.model.memory = None
    assert [one.model.residence for one in (base, refiner)] == alone
    assert [one.plan for one in alone if one is not None] == plans


def test_weights_that_are_stored_in_eight_bits_are_streamed_in_eight_bits(family_folders: dict[str, Path]) -> None:
    spec = ModelSpec(name="small", family="flux-dev", source=family_folders["flux-dev"])
    model = LoadedModel(FAMILIES["flux-dev"].load(spec, "cpu"))
    network = model.denoiser.root
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)  # type: ignore[operator]
    expected = drawn(model, NoCache())[0]
    residence = model.model.residence = Residence({"transformer": network}, torch.device("cpu"))
    residence.settle(Plan(offload="group", moved=frozenset({"transformer"}), kept={"transformer": 0}))
    assert np.array_equal(drawn(model, NoCache())[0], expected)
    slots = {tensor.untyped_storage().data_ptr() for block in blocks_of(network) for tensor in block.parameters()}
    assert len(slots) == 2
    assert residence.copied < 4 * 1.1 * residence.sizes.weights["transformer"]


@pytest.mark.parametrize("kept", [None, 0, 1], ids=["whole", "streamed", "one kept"])
def test_what_modules_share_is_moved_once_and_shared_again(monkeypatch: pytest.MonkeyPatch, kept: int | None) -> None:
    """A matrix of an output that is that of the words, and one of two blocks. On the meta device."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.blocks = nn.Embedding(6, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.blocks[2].weight = self.blocks[0].weight
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.words.weight

        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            hidden = self.words(numbers)
            for block in self.blocks:
                hidden = block(hidden)
            made: torch.Tensor = self.head(hidden)
            return made

    def parameters() -> dict[str, nn.Parameter]:
        return dict(network.named_parameters(remove_duplicate=False))

    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # the meta device pins nothing
    network = Tied()
    values = {name: one.detach().clone() for name, one in parameters().items()}
    residence = Residence(
        {"text_encoder": network, "unet": nn.Linear(1, 1), "vae": nn.Linear(1, 1)}, torch.device("meta")
    )
    matrices, biases = (24 + 16 + 16) * 4, 3 * 16
    assert residence.sizes.weights["text_encoder"] == matrices + biases
    assert residence.sizes.blocks["text_encoder"] == [16, 16 + 64, 16]  # but for the matrix of two
    moved, keeping = frozenset(residence.networks), {} if kept is None else {"text_encoder": kept}
    residence.settle(Plan(offload="group", moved=moved, kept=keeping))
    before = parameters()
    assert before["head.weight"] is before["words.weight"]
    assert before["blocks.2.weight"] is before["blocks.0.weight"]
    for _ in range(2):
        copied = residence.copied
        assert network(torch.zeros(1, dtype=torch.long, device="meta")).is_meta
        there = parameters()
        assert all(one.is_meta for one in there.values())
        assert there["head.weight"] is there["words.weight"]
        assert there["blocks.2.weight"] is there["blocks.0.weight"]
        assert residence.copied - copied <= matrices + biases + 16  # of the streamed, the first comes for the next call
        residence.send_away(["text_encoder"])
        assert all(one is before[name] for name, one in parameters().items())
        assert all(torch.equal(one, values[name]) for name, one in parameters().items())


def test_weights_that_are_no_plain_tensors_stay() -> None:
    class Packed(nn.Parameter):
        pass

    network = nn.Module()
    network.weight = Packed(torch.zeros(10), requires_grad=False)
    networks = {"text_encoder": nn.Linear(10, 10), "unet": network, "vae": nn.Linear(10, 10)}
    sizes = Residence(networks, torch.device("cpu")).sizes
    assert sizes.fixed == {"unet"}
    plan = choose(sizes, Work(text=0, denoise=10**4, decode=0, tiled=0), 0)
    assert plan.moved == {"text_encoder", "vae"}


def test_what_could_not_come_as_a_whole_has_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, whose memory ends with the second tensor."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    residence = Residence({"unet": network, "vae": nn.Linear(1, 1)}, torch.device("meta"))
    residence.settle(Plan(offload="model", moved=frozenset({"unet", "vae"})))
    came: list[int] = []

    def count(size: int) -> None:
        came.append(size)
        if len(came) == 2:
            raise MemoryError

    monkeypatch.setattr(residence._guests["unet"], "_count", count)
    with pytest.raises(MemoryError):
        network(torch.zeros(1, 4, device="meta"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert residence.held == 0
    assert network(torch.zeros(1, 4, device="meta")).is_meta  # the next call brings it
    assert residence.held == residence.sizes.weights["unet"]
