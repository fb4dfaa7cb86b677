"""FairMOT's heads decoded by GPU kernels: the rows that torch's operators give, in every layout and type."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from kernel_runs import PLACES, Run, run_at
from torch import Tensor

from tracker.errors import EngineError
from tracker.frontends.fairmot import decode, peak_scores
from tracker.frontends.preprocess import Preprocessor
from tracker.kernels.heads import decode_heads
from tracker.manifest import beside, read
from tracker.runtimes.onnx import OnnxRuntime
from tracker.sources.planes import image_of
from tracker.types import Frame

Heads = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=PLACES)
def run(request: pytest.FixtureRequest) -> Run:
    return run_at(request)


def random_heads(
    batch: int = 1,
    classes: int = 1,
    height: int = 12,
    width: int = 20,
    *,
    sides: int = 4,
    dimensions: int = 8,
    change: Callable[[Tensor], Tensor] = lambda head: head,
) -> Heads:
    """Heat map logits, wh, reg and embedding, each as `change` makes it."""
    torch.manual_seed(3)
    heads = (torch.randn(batch, channels, height, width) for channels in (classes, sides, 2, dimensions))
    hm, wh, reg, embedding = (change(head) for head in heads)
    return hm, wh, reg, embedding


def reference(heads: Heads, limit: int) -> Tensor:
    hm, *others = (head.float() for head in heads)
    return decode(peak_scores(hm), *others, limit=limit)


def part_of_more(head: Tensor) -> Tensor:
    """Channels last, and padded to a multiple of eight, as TensorRT can hand them out."""
    batch, channels, height, width = head.shape
    more = torch.zeros(batch, height, width, -(-channels // 8) * 8, dtype=head.dtype)
    more[..., :channels] = head.permute(0, 2, 3, 1)
    return more[..., :channels].permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "heads",
    [
        random_heads(batch=3),
        random_heads(classes=3, sides=2),
        random_heads(change=lambda head: head.contiguous(memory_format=torch.channels_last)),
        random_heads(batch=2, change=part_of_more),
        random_heads(dimensions=5, height=7, width=9),
    ],
    ids=["plain", "classes, wh of two", "channels last", "part of more channels", "odd sizes"],
)
def test_rows_are_those_of_torch(run: Run, heads: Heads) -> None:
    expected = reference(heads, 6)
    assert expected[..., 4].min() > 0  # given at least as many peaks as are asked for
    rows = run(decode_heads, *heads, logits=True, limit=6)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_heads_are_decoded_in_single_precision(run: Run) -> None:
    heads = random_heads(batch=2, height=9, change=Tensor.half)
    rows = run(decode_heads, *heads, logits=True, limit=10)
    torch.testing.assert_close(rows, reference(heads, 10), rtol=1e-5, atol=1e-6)


def test_peaks_that_the_engine_found_are_taken_as_they_are(run: Run) -> None:
    hm, *others = random_heads(batch=2)
    peaks = peak_scores(hm)
    rows = run(decode_heads, peaks, *others, logits=False, limit=15)
    torch.testing.assert_close(rows, decode(peaks, *others, limit=15), rtol=1e-6, atol=1e-6)


def test_the_demo_engines_answer_to_a_real_frame(run: Run) -> None:
    engine = ROOT / "engines" / "fairmot_demo.onnx"
    manifest = read(beside(engine))
    with av.open(str(ROOT / "videos" / "demo.mp4")) as container:
        picture = next(container.decode(video=0))
    frame = Frame(index=0, pts_seconds=0.0, size=(picture.width, picture.height), image=image_of(picture))
    tensor, _ = Preprocessor(manifest.input, 1)([frame])
    outputs = OnnxRuntime(Path(engine), device="cpu").run({manifest.input.name: tensor})
    by_role = {role: outputs[name] for role, name in manifest.outputs.items()}
    scores = by_role["peaks"] if "peaks" in by_role else peak_scores(by_role["hm"])
    others = [by_role[role] for role in ("wh", "reg", "id")]

    rows = run(decode_heads, scores, *others, logits=False, limit=100)

    expected = decode(scores, *others, limit=100)
    found = expected[..., 4] > 0
    assert (expected[..., 4] > 0.4).sum() >= 3  # there are people in it
    torch.testing.assert_close(rows[found], expected[found], rtol=1e-5, atol=1e-5)


def test_of_equal_scores_the_first_cells_win_in_order(run: Run) -> None:
    hm, wh, reg, embedding = random_heads(height=6, width=10)
    hm[:] = 2.0  # a plateau: no cell has a stronger neighbour
    rows = run(decode_heads, hm, wh * 0, reg * 0, embedding, logits=True, limit=13)[0]
    assert rows[:, :2].tolist() == [[cell % 10, cell // 10] for cell in range(13)]


def test_fewer_peaks_than_rows_leave_zeros(run: Run) -> None:
    hm, *others = random_heads(height=6, width=10)
    hm[:] = -200.0  # a sigmoid of 0
    hm[0, 0, 2, 3] = 1.0
    rows = run(decode_heads, hm, *others, logits=True, limit=500)[0]
    assert len(rows) == 60  # there are no more cells
    assert rows[0, 4] == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item())
    assert not rows[1:].any()


def test_nan_comes_first_so_that_nobody_misses_it(run: Run) -> None:
    hm, *others = random_heads()
    hm[0, 0, 4, 4] = math.nan
    rows = run(decode_heads, hm, *others, logits=True, limit=5)[0]
    assert rows[0, 4].isnan()
    assert not rows[1:, 4].isnan().any()


def test_an_embedding_of_zeros_stays_zeros(run: Run) -> None:
    hm, wh, reg, embedding = random_heads()
    rows = run(decode_heads, hm, wh, reg, embedding * 0, logits=True, limit=5)
    assert not rows[..., 6:].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limit": 5000}, "5000 candidates.*1 to 4096"),
        ({"out": torch.empty(1, 5, 3)}, r"float32 \(1, 5, 14\), not torch.float32 \(1, 5, 3\)"),
        ({"wh": torch.zeros(1, 4, 24, 20)[:, :, ::2]}, "rows must follow each other"),
    ],
    ids=["too many", "wrong out", "rows apart"],
)
def test_what_it_cannot_take_is_said(run: Run, change: dict[str, object], said: str) -> None:
    hm, wh, reg, embedding = random_heads()
    arguments = {"wh": wh, "limit": 5, "logits": True} | change
    with pytest.raises(EngineError, match=said):
        run(decode_heads, hm, reg=reg, embedding=embedding, **arguments)


def test_on_a_gpu_it_never_waits_and_can_be_captured(gpu: torch.device) -> None:
    def changed(head: Tensor) -> Tensor:
        return head.to(gpu)

    heads = random_heads(batch=2, height=152, width=272, dimensions=128, change=changed)
    out = decode_heads(*heads, logits=True, limit=500)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_heads(*heads, logits=True, limit=500)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_heads(*heads, logits=True, limit=500, out=out)
    for head in heads:
        head.copy_(head.flip(3).clone())  # other values at the same addresses
    graph.replay()
    np.testing.assert_allclose(out.cpu(), reference(heads, 500).cpu(), rtol=1e-4, atol=1e-4)
