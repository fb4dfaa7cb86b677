"""Last layers of heads as one kernel: what torch's operators give, in every type and size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from kernel_runs import PLACES, Run, run_at
from torch import Tensor

from tracker.errors import EngineError
from tracker.kernels.tails import last_layer

Given = tuple[Tensor, Tensor, Tensor, Tensor, int]


@pytest.fixture(params=PLACES)
def run(request: pytest.FixtureRequest) -> Run:
    return run_at(request)


def case(
    outputs: int,
    dtype: torch.dtype = torch.float16,
    weight_dtype: torch.dtype | None = None,
    *,
    inputs: int = 128,
    first: int = 64,
    size: tuple[int, int, int] = (2, 5, 7),
) -> Given:
    """hidden, weight, bias, hidden_bias and first, of a hidden layer with more channels than are read."""
    torch.manual_seed(outputs)
    batch, height, width = size
    hidden = torch.randn(batch, first + inputs + 64, height, width).to(dtype)
    weight_dtype = weight_dtype or dtype
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(weight_dtype)
    bias, hidden_bias = torch.randn(outputs).to(weight_dtype), torch.randn(inputs).to(weight_dtype)
    return hidden.to(memory_format=torch.channels_last), weight, bias, hidden_bias, first


def expected(hidden: Tensor, weight: Tensor, bias: Tensor, hidden_bias: Tensor, first: int) -> Tensor:
    """In float64, but for the hidden layer's rounding to the weight's type."""
    part = hidden[:, first : first + weight.shape[1]].permute(0, 2, 3, 1).double()
    rows = F.relu(part + hidden_bias.double()).to(weight.dtype).double()
    return F.linear(rows, weight.double(), bias.double()).permute(0, 3, 1, 2)


def assert_near(got: Tensor, given: Given) -> None:
    wanted = expected(*given)
    assert got.dtype == given[1].dtype and got.shape == wanted.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    allowed = 1e-3 if got.dtype == torch.float16 else 1e-6
    assert (got.double() - wanted).norm() <= allowed * wanted.norm()


@pytest.mark.parametrize("outputs", [1, 2, 4, 16, 100, 128])
def test_agrees_with_torch(run: Run, outputs: int) -> None:
    given = case(outputs)
    assert_near(run(last_layer, *given), given)


def test_wide_weights_are_multiplied_as_such(run: Run) -> None:
    given = case(1, torch.float16, torch.float32)
    assert_near(run(last_layer, *given), given)


def test_a_head_alone(run: Run) -> None:
    given = case(4, torch.float32, inputs=64, first=0, size=(1, 1, 1))
    assert_near(run(last_layer, *given), given)


def test_channels_apart_are_taken_too(run: Run) -> None:
    hidden, *others = case(4)
    assert_near(run(last_layer, hidden.contiguous(), *others), (hidden, *others))


def test_on_a_cpu_the_operator_is_torchs_own() -> None:
    given = case(4, torch.float32)
    assert_near(torch.ops.tracker.last_layer(*given), given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(4, 100), "hidden_bias": torch.zeros(100)}, "takes a multiple of 64"),
        ({"first": 160}, "not channels 160 to 288 of 256 to 4"),
        ({"bias": torch.zeros(5)}, r"bias of a last layer of 128 to 4 channels has shape \(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor | int], words: str) -> None:
    names = ("hidden", "weight", "bias", "hidden_bias", "first")
    given = dict(zip(names, case(4, torch.float32), strict=True)) | change
    with pytest.raises(EngineError, match=words):
        torch.ops.tracker.last_layer(*given.values())


@pytest.mark.filterwarnings("default")  # torch's compiler warns about what it does
def test_on_a_gpu_compilers_see_through_it(gpu: torch.device) -> None:
    hidden, weight, bias, hidden_bias, first = case(128, inputs=256, size=(2, 19, 34))
    given = [tensor.to(gpu) for tensor in (hidden, weight, bias, hidden_bias)]
    compiled = torch.compile(
        lambda *tensors: torch.ops.tracker.last_layer(*tensors, first) * 2, fullgraph=True
    )
    assert_near((compiled(*given) / 2).cpu(), (hidden, weight, bias, hidden_bias, first))
