"""The simulated device against what CUDA documents and what PyTorch computes on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.geometries import ALL, Geometry
from models.libraries import quiet
from models.memory import peak_bytes
from tests.accelerator.conftest import Load
from tests.accelerator.device import NAME, SMALL, Accelerator, DeviceTensor

PARAMETERS = {  # of the published weights
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "flux-dev": {"transformer": 11_901_408_320, "vae": 83_819_683, "text_encoder_2": 4_762_310_656},
    "flux-schnell": {"transformer": 11_891_178_560, "vae": 83_819_683, "text_encoder_2": 4_762_310_656},
}


def known(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=NAME)


def unknown(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=NAME)


def test_small_tensors_compute_and_large_ones_have_a_shape(device: Accelerator) -> None:
    small = known(1, 2, 3) * 2 + torch.arange(3, device=NAME)
    assert small.device == torch.device(f"{NAME}:0")
    assert small.tolist() == [2.0, 5.0, 8.0]
    small[1:].mul_(10)
    small[torch.tensor([0])] = 1.0
    assert small.tolist() == [1.0, 50.0, 80.0]
    assert small[small > 1].tolist() == [50.0, 80.0]
    assert copy.deepcopy(small).tolist() == small.tolist()
    large = unknown(SMALL + 1)
    assert isinstance(large, DeviceTensor)
    assert (large[None].expand(3, -1).sum(1).shape, large.dtype) == ((3,), torch.float16)
    with pytest.raises(TypeError, match="can't convert simulated:0 device type tensor to numpy"):
        small.numpy()


def test_values_are_scripted_where_nobody_knows_them(device: Accelerator) -> None:
    device.script = lambda shape: torch.arange(shape.numel()).view(shape)
    large = unknown(2, SMALL)
    assert large.sum(1).tolist() == [0, 1]
    small = torch.zeros(2, device=NAME)
    whole = small.view(1, 2)
    small.copy_(large[:, 0])  # also for whoever else looks at those numbers
    assert whole.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "operation",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: functional.linear(here[None], there[None]),
        lambda here, there: there[torch.tensor([1], device=NAME)],
        lambda here, there: there.add_(here[0]),
        lambda here, there: functional.scaled_dot_product_attention(
            *[here.view(1, 1, 1, 3)] * 2, there.view(1, 1, 1, 3)
        ),
    ],
)
def test_tensors_of_two_devices_are_refused(device: Accelerator, operation: Callable[..., Tensor]) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        operation(unknown(3, dtype=torch.float32), torch.ones(3))


def test_what_cuda_allows_is_allowed(device: Accelerator) -> None:
    here = known(1, 2, 3)
    assert (here * torch.tensor(2.0)).tolist() == [2, 4, 6]
    assert here[torch.tensor([2, 0])].tolist() == [3, 1]
    assert torch.zeros(3).copy_(here).tolist() == [1, 2, 3]


def test_other_mistakes_are_refused(device: Accelerator) -> None:
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        torch.empty(3, device="meta").to(NAME)
    with pytest.raises(RuntimeError, match="simulated generator but found one of cpu"):
        torch.randn(3, generator=torch.Generator("cpu"), device=NAME)
    with pytest.raises(RuntimeError, match="one data type"):
        functional.linear(unknown(3, 4), unknown(5, 4, dtype=torch.float32))
    with pytest.raises(RuntimeError, match=r"attention of torch.float16, torch.float32"):
        functional.scaled_dot_product_attention(unknown(1, 1, 2, 8), *[unknown(1, 1, 2, 8, dtype=torch.float32)] * 2)
    drawn = torch.randn(3, generator=torch.Generator(NAME).manual_seed(1), device=NAME)
    assert drawn.shape == (3,)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x[0]), 1),
        (lambda x: bool((x > 1).any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: torch.linalg.solve(torch.eye(3, device=NAME), x), 1),  # whether it could be solved is read
        (lambda x: torch.tensor([1.0], device=NAME), 1),
        (lambda x: torch.ones(3).to(NAME), 1),
        (lambda x: torch.ones(3).to(NAME, non_blocking=True), 1),  # out of ordinary memory
        (lambda x: torch.ones(3).pin_memory().to(NAME), 1),
        (lambda x: x[[0, 1]], 1),  # the list becomes a tensor
        (lambda x: torch.arange(3)[x.sum().long() * 0], 1),  # a number of the device as an index
        (lambda x: torch.ones(3).pin_memory().to(NAME, non_blocking=True), 0),
        (lambda x: x * torch.tensor(2.0) + 1, 0),
        (lambda x: torch.arange(3, device=NAME) + torch.full((3,), 2, device=NAME), 0),
        (lambda x: x.masked_fill(x > 1, 0), 0),
        (lambda x: torch.where(x > 1, x, 0), 0),
        (lambda x: x[torch.tensor(1)], 0),
        (lambda x: torch.linalg.solve_ex(torch.eye(3, device=NAME), x), 0),
    ],
)
def test_the_host_waits(device: Accelerator, operation: Callable[[Tensor], object], expected: int) -> None:
    x = known(1, 2, 3)
    with device.counting() as counts:
        operation(x)
    assert sum(counts.waits.values()) == expected


def test_a_wait_is_charged_to_the_line_that_caused_it(device: Accelerator) -> None:
    scheduler = EulerDiscreteScheduler()
    with quiet():
        scheduler.set_timesteps(4, device=NAME)
    with device.counting() as counts:
        scheduler.scale_model_input(unknown(1, 4, 8, 8), scheduler.timesteps[0])
    assert {place.split(":")[0] for place in counts.waits} == {
        "shape diffusers/schedulers/scheduling_euler_discrete.py",
        "read diffusers/schedulers/scheduling_euler_discrete.py",
    }


def test_a_view_is_no_launch_and_holds_its_storage(device: Accelerator) -> None:
    before = device.live
    with device.counting() as counts:
        whole = torch.empty(1000, 1000, dtype=torch.float16, device=NAME)
        part = whole[:1].view(10, 100).transpose(0, 1)
        del whole
        assert (counts.launches, device.live - before) == (0, 2_000_000)
        part.add_(1)
        more = part + 1
        assert (counts.launches, device.live - before) == (2, 2_002_000)
    del part, more
    assert device.live == before
    assert counts.peak - before == 2_002_000


def test_attention_keeps_no_scores(device: Accelerator) -> None:
    query = unknown(1, 8, 4096, 64)
    with device.counting() as counts:
        answer = functional.scaled_dot_product_attention(query, query, query)
    assert (answer.shape, counts.launches) == (query.shape, 1)
    assert counts.peak == device.live
    assert answer.transpose(1, 2).is_contiguous()  # as the fused kernels lay it


def test_the_peak_is_that_of_the_servers_own_count(device: Accelerator) -> None:
    """`models.memory.peak_bytes`, another tool on the meta device, which PyTorch's profiler was held against."""
    layers = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 8, 3))
    with torch.device("meta"):
        rows = torch.empty(2, 4, 64, 64)
        expected = peak_bytes(lambda: copy.deepcopy(layers).to("meta")(rows))
    layers, here = layers.to(NAME), torch.empty(2, 4, 64, 64, device=NAME)
    before = device.live
    with device.counting() as counts:
        layers(here)
    assert counts.peak - before == expected


def test_nothing_of_it_is_seen_outside_of_its_context(device: Accelerator) -> None:
    assert torch.accelerator.is_available()
    device.__exit__()
    try:
        assert not torch.accelerator.is_available()
        assert torch.zeros(3).sum().item() == 0
        with device, pytest.raises(RuntimeError, match="one simulated device at a time"):
            Accelerator().__enter__()
    finally:
        device.__enter__()


@pytest.mark.parametrize("geometry", ALL, ids=lambda one: one.name)
def test_the_networks_have_the_published_size(load: Load, geometry: Geometry) -> None:
    parts = load(geometry).pipeline.components  # type: ignore[attr-defined]
    for name, expected in PARAMETERS[geometry.name].items():
        assert sum(parameter.numel() for parameter in parts[name].parameters()) == expected, name
        assert {parameter.device.type for parameter in parts[name].parameters()} == {NAME}
