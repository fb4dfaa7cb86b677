"""The fused deformable convolution: the numbers of its torch reference, as an operator that torch knows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kernel_runs import PLACES, Run, run_at
from torch import Tensor

from tracker.errors import EngineError
from tracker.kernels import deform
from tracker.kernels.deform import PLANS, Plan, deform_conv2d, pack_weight, plan_for, tune
from tracker.models import deform as reference

FAIRMOT = [  # channels in, out, height, width
    (64, 64, 152, 272),
    (128, 64, 76, 136),
    (128, 128, 76, 136),
    (256, 64, 38, 68),
    (256, 128, 38, 68),
    (256, 256, 38, 68),
    (512, 256, 19, 34),
]
ALLOWED = {torch.float16: 1e-3, torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the result's norm
Case = dict[str, Tensor]


@pytest.fixture(params=PLACES)
def run(request: pytest.FixtureRequest) -> Run:
    return run_at(request)


def case(
    channels: int,
    outputs: int,
    height: int,
    width: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
) -> Case:
    """Arguments by name, offsets and masks being parts of one tensor, as one convolution gives them."""
    torch.manual_seed(channels + outputs)
    shifts = torch.randn(batch, 27, height, width) * spread
    shifts = shifts.to(dtype).contiguous(memory_format=torch.channels_last)
    x = torch.randn(batch, channels, height, width).relu()
    return {
        "x": x.to(dtype).contiguous(memory_format=torch.channels_last),
        "offset": shifts[:, :18],
        "mask": shifts[:, 18:],
        "weight": (torch.randn(outputs, channels, 3, 3) / (3 * channels**0.5)).to(dtype),
        "bias": torch.randn(outputs).to(dtype),
    }


def expected(case: Case, *, logits: bool = True, relu: bool = False) -> Tensor:
    """In float64, on the numbers as they were rounded."""
    x, offset, mask, weight, bias = (tensor.cpu().double() for tensor in case.values())
    answer = reference.deform_conv2d(x, offset, mask.sigmoid() if logits else mask, weight, bias)
    return answer.relu() if relu else answer


def fused(run: Run, case: Case, *, logits: bool = True, relu: bool = False) -> Tensor:
    packed = case | {"weight": pack_weight(case["weight"])}
    answer: Tensor = run(deform_conv2d, *packed.values(), mask_logits=logits, relu=relu)
    return answer


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert (got.double() - wanted).norm() <= ALLOWED[dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)  # bfloat16 cannot be interpreted
@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        ((16, 32, 9, 11), 1),
        ((64, 64, 8, 8), 2),
        ((32, 40, 12, 5), 1),
        ((48, 16, 3, 17), 1),
        ((16, 8, 1, 1), 1),
    ],
    ids=["odd size", "batch", "odd outputs", "48 channels", "one pixel"],
)
def test_agrees_with_the_reference(
    run: Run, shape: tuple[int, int, int, int], batch: int, dtype: torch.dtype
) -> None:
    given = case(*shape, batch=batch, dtype=dtype)
    got = fused(run, given)
    assert got.shape == (batch, shape[1], *shape[2:])
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_near(got, expected(given), dtype)


def test_masks_as_factors_and_a_relu(run: Run) -> None:
    given = case(16, 16, 8, 8)
    given["mask"] = given["mask"].sigmoid()
    assert_near(
        fused(run, given, logits=False, relu=True), expected(given, logits=False, relu=True), torch.float32
    )


def test_without_bias(run: Run) -> None:
    given = case(16, 16, 8, 8)
    answer = run(
        deform_conv2d, given["x"], given["offset"], given["mask"], pack_weight(given["weight"]), None, True
    )
    assert_near(answer, expected(given | {"bias": torch.zeros(16)}), torch.float32)


def test_offsets_and_masks_may_come_as_one_tensor_with_more_channels(run: Run) -> None:
    given = case(16, 16, 8, 8)
    shifts = torch.cat([given["offset"], given["mask"], torch.full((1, 5, 8, 8), math.nan)], 1)
    packed = given | {"offset": shifts, "mask": shifts, "weight": pack_weight(given["weight"])}
    assert_near(run(deform_conv2d, *packed.values(), True), expected(given), torch.float32)


@pytest.mark.parametrize("logits", [True, False])
def test_a_bias_of_offsets_and_masks_may_come_apart_from_them(run: Run, logits: bool) -> None:
    given = case(16, 16, 8, 8)
    bias = torch.linspace(-1.5, 2.0, 27)
    added = given | {
        "offset": given["offset"] + bias[:18, None, None],
        "mask": given["mask"] + bias[18:, None, None],
    }
    packed = given | {"weight": pack_weight(given["weight"])}
    got = run(deform_conv2d, *packed.values(), logits, False, bias)
    assert_near(got, expected(added, logits=logits), torch.float32)


@pytest.mark.parametrize("spread", [0.0, 40.0], ids=["no offsets", "mostly outside"])
def test_samples_outside_are_zero(run: Run, spread: float) -> None:
    given = case(16, 16, 10, 10, spread=spread)
    assert_near(fused(run, given), expected(given), torch.float32)


def test_offsets_beyond_all_reason_read_nothing(run: Run) -> None:
    given = case(16, 16, 6, 6)
    wild = given["offset"].clone()
    wild[:, ::2], wild[:, 1::2] = 1e30, -math.inf
    torch.testing.assert_close(
        fused(run, given | {"offset": wild}), given["bias"].view(1, -1, 1, 1).expand(1, 16, 6, 6)
    )


def test_images_with_channels_apart_are_taken_too(run: Run) -> None:
    given = case(16, 16, 8, 8)
    given["x"] = given["x"].contiguous()
    assert_near(fused(run, given), expected(given), torch.float32)


@pytest.mark.parametrize(
    "plan",
    [Plan(split=3), Plan(split=9, block_c=32), Plan(4, 8, 128), Plan(8, 16, 64, 3, 8, 16)],
    ids=str,
)
def test_every_way_to_cut_the_work_gives_the_same(run: Run, plan: Plan) -> None:
    given = case(64, 24, 9, 10, batch=2)
    packed = given | {"weight": pack_weight(given["weight"])}
    got = run(deform_conv2d, *packed.values(), True, True, plan=plan)
    assert_near(got, expected(given, relu=True), torch.float32)


def answer_in_wide_memory(x: Tensor, *arguments: Tensor) -> Tensor:
    """What is written into the middle of a tensor with more channels."""
    batch, _, height, width = x.shape
    wide = torch.full((batch, height, width, 24), 7.0, device=x.device).permute(0, 3, 1, 2)
    deform_conv2d(x, *arguments, mask_logits=True, out=wide[:, 4:20])
    assert (wide[:, :4] == 7).all() and (wide[:, 20:] == 7).all()
    return wide[:, 4:20].contiguous()


def test_writes_where_asked(run: Run) -> None:
    given = case(16, 16, 7, 9)
    packed = given | {"weight": pack_weight(given["weight"])}
    assert_near(run(answer_in_wide_memory, *packed.values()), expected(given), torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"offset": torch.zeros(1, 9, 8, 8)}, r"offset .* shape \(1, 9, 8, 8\); it must be \(1, 18, 8, 8\)"),
        ({"weight": torch.zeros(16, 16, 3, 3)}, r"weight .* it must be \(9, 16, 3\)"),
        ({"x": torch.zeros(1, 24, 8, 8), "weight": torch.zeros(9, 24, 16)}, "multiple of 16 channels"),
        ({"weight": torch.zeros(9, 16, 16).half()}, "of torch.float32 with torch.float16"),
    ],
    ids=["offset", "weight not packed", "channels", "types"],
)
def test_what_does_not_fit_is_said(change: Case, said: str) -> None:
    given = case(16, 16, 8, 8)
    packed = given | {"weight": pack_weight(given["weight"])} | change
    with pytest.raises(EngineError, match=said):
        deform_conv2d(*packed.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_on_a_cpu_the_operator_is_its_reference(dtype: torch.dtype) -> None:
    given = case(16, 24, 8, 8, dtype=dtype)
    packed = given | {"weight": pack_weight(given["weight"])}
    answer = torch.ops.tracker.deform_conv2d(*packed.values(), True, True)
    assert answer.is_contiguous(memory_format=torch.channels_last)
    assert_near(answer, expected(given, relu=True), dtype)


class Block(torch.nn.Module):
    """The operator between two others."""

    def __init__(self, given: Case) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(pack_weight(given["weight"]), requires_grad=False)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        answer: Tensor = torch.ops.tracker.deform_conv2d(x * 2, offset, mask, self.weight, None, True, True)
        return answer + 1


def test_export_keeps_it_as_one_node_with_its_shape() -> None:
    given = case(16, 24, 8, 6)
    arguments = given["x"], given["offset"], given["mask"]
    exported = torch.export.export(Block(given), arguments)
    (node,) = [n for n in exported.graph.nodes if n.target is torch.ops.tracker.deform_conv2d.default]
    assert node.meta["val"].shape == (1, 24, 8, 6)
    assert node.meta["val"].stride()[1] == 1


@pytest.mark.parametrize(
    ("shape", "outputs", "split"),
    [
        ((1, 64, 152, 272), 64, 1),
        ((1, 256, 38, 68), 256, 3),
        ((1, 512, 19, 34), 256, 9),
        ((8, 512, 19, 34), 256, 1),
    ],
    ids=str,
)
def test_small_maps_are_split_among_more_programs(shape: tuple[int, ...], outputs: int, split: int) -> None:
    x = torch.empty(shape, dtype=torch.float16, device="meta")
    assert plan_for(x, outputs).split == split


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("shape", FAIRMOT, ids=str)
def test_on_a_gpu_every_block_of_fairmot_is_exact(
    gpu: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    given = {name: tensor.to(gpu) for name, tensor in case(*shape, dtype=dtype).items()}
    packed = given | {"weight": pack_weight(given["weight"])}
    assert_near(deform_conv2d(*packed.values(), mask_logits=True).cpu(), expected(given), dtype)


def on_gpu(gpu: torch.device) -> tuple[Case, Callable[[], Tensor]]:
    given = {name: tensor.to(gpu) for name, tensor in case(64, 64, 19, 34, dtype=torch.float16).items()}
    packed = given | {"weight": pack_weight(given["weight"])}
    return given, lambda: deform_conv2d(*packed.values(), mask_logits=True)


def test_on_a_gpu_it_never_waits_and_can_be_captured(gpu: torch.device) -> None:
    given, work = on_gpu(gpu)
    work()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = work()
    given["x"].copy_(given["x"].flip(3).clone())  # other values at the same addresses
    graph.replay()
    assert_near(answer.cpu(), expected(given), torch.float16)


@pytest.mark.filterwarnings("default")  # torch's compiler warns about what it does
def test_on_a_gpu_compilers_see_through_it(gpu: torch.device) -> None:
    given, _ = on_gpu(gpu)
    block = Block(given)
    arguments = given["x"], given["offset"], given["mask"]
    compiled = torch.compile(block, fullgraph=True)(*arguments)
    torch.testing.assert_close(compiled, block(*arguments), rtol=1e-2, atol=1e-2)


def test_on_a_gpu_tuning_finds_the_fastest_plan(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [plan for plan in PLANS if plan.block_o == 64 and plan.split > 1 and plan.block_c == 64]
    monkeypatch.setattr(deform, "PLANS", some)
    given, work = on_gpu(gpu)
    before = plan_for(given["x"], 64)
    measured = tune(given["x"], given["offset"], given["mask"], pack_weight(given["weight"]))
    assert [taken for taken, _ in measured] == sorted(taken for taken, _ in measured)
    assert {plan for _, plan in measured} == set(some)
    assert plan_for(given["x"], 64) == measured[0][1]
    assert before in some
    assert_near(work().cpu(), expected(given), torch.float16)
