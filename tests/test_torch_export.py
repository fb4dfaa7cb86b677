""".pt2 files: one network as torch exports and compiles it, tracking as its ONNX file does."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import write_clip
from torch import Tensor, nn

import tracker
from tracker import manifest as manifests
from tracker.deploy.export import ExportConfig, export_fairmot, generated_frames
from tracker.engine import describe, open_engine
from tracker.errors import ConfigError, EngineError
from tracker.graphs import Graphs
from tracker.models.fairmot import FairMOT, FairMOTConfig, random_fairmot
from tracker.runtimes.torch_export import TorchExportRuntime
from tracker.types import Frame

pytestmark = pytest.mark.usefixtures("one_thread")

Dim = torch.export.Dim


class Affine(nn.Module):
    """x (B, 3) → double (B, 3) and sum (B,) of x, weight included."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"double": self.weight * x, "sum": x.sum(1)}


def exported(model: nn.Module, *inputs: Tensor, most: int | None = 4, least: int = 1) -> Any:
    """most: None for a static batch."""
    shapes = None if most is None else tuple({0: Dim("batch", min=least, max=most)} for _ in inputs)
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)


def saved(path: Path, model: nn.Module, *inputs: Tensor, **options: Any) -> Path:
    torch.export.save(exported(model, *inputs, **options), path)
    return path


@pytest.fixture(scope="module")
def affine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("affine") / "a.pt2", Affine(), torch.rand(2, 3))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_named_tensors_in_and_out(affine: Path, count: int) -> None:
    runtime = TorchExportRuntime(affine, device="cpu", trusted=True)
    assert runtime.inputs == {"x": (None, 3)}
    assert runtime.outputs == {"double": (None, 3), "sum": (None,)}
    assert runtime.dtypes == dict.fromkeys(("x", "double", "sum"), torch.float32)
    assert (runtime.max_batch, runtime.lanes) == (4, 1)
    assert runtime.description == f"torch.export, torch {torch.__version__} on cpu"
    x = torch.rand(count, 3)
    answer = runtime.run({"x": x})
    runtime.run({"x": -x})
    torch.testing.assert_close(answer, {"double": 2 * x, "sum": x.sum(1)})
    with pytest.raises(EngineError, match="batch is 5; this engine takes 1 to 4 images at once"):
        runtime.run({"x": torch.rand(5, 3)})


def test_a_lane_answers_for_the_first_rows(affine: Path) -> None:
    lane = TorchExportRuntime(affine, device="cpu", trusted=True).lane()
    lane.inputs["x"][:] = torch.arange(12.0).reshape(4, 3)
    assert lane.enqueue(3)["sum"].tolist() == [3, 12, 21]
    assert lane.enqueue(1)["double"].tolist() == [[0, 2, 4]]
    with pytest.raises(EngineError, match="batch is 0"):
        lane.enqueue(0)


def test_a_static_batch_takes_fewer_images_in_a_lane(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt2", Affine(), torch.rand(3, 3), most=None)
    runtime = TorchExportRuntime(path, device="cpu", trusted=True)
    assert runtime.inputs == {"x": (3, 3)}
    lane = runtime.lane()
    lane.inputs["x"][:2] = 1
    assert lane.enqueue(2)["sum"].tolist() == [3, 3]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x + x}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8])
def test_precision_and_layout_are_the_programs(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    runtime = TorchExportRuntime(saved(tmp_path / "a.pt2", Doubled(), x), device="cpu", trusted=True)
    assert runtime.lane().inputs["x"].is_contiguous(memory_format=torch.channels_last)
    answer = runtime.run({"x": x})["y"]
    assert answer.dtype == dtype
    assert torch.equal(answer, x + x)


class Nameless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Summed(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x.sum(0)}


def packaged(path: Path) -> None:
    """As AOTInductor lays out what it compiled."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data/aotinductor/model/x.wrapper_metadata.json", '{"AOTI_DEVICE_KEY": "cpu"}')
        archive.writestr("a/data/aotinductor/model/x.wrapper.so", b"code")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: saved(path, Nameless(), torch.rand(2, 3)), "gives no named tensors: export a forward"),
        (lambda path: saved(path, Summed(), torch.rand(2, 3)), "differ in their first dimension"),
        (lambda path: path.write_text("no archive"), r"is no \.pt2 file or is cut short: export or copy"),
        (lambda path: torch.save({"x": torch.ones(1)}, path), "holds no network exported by torch"),
        (packaged, r"is a package compiled by AOTInductor; only .*: write one with tools/export\.py"),
        (lambda path: path.mkdir(), "cannot read"),
    ],
)
def test_files_that_no_lane_can_run(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "a.pt2")
    with pytest.raises(EngineError, match=words) as error:
        TorchExportRuntime(tmp_path / "a.pt2", device="cpu", trusted=True)
    assert "\n" not in str(error.value)


def test_an_operator_that_this_torch_lacks(
    affine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, content = tmp_path / "a.pt2", io.BytesIO()
    with zipfile.ZipFile(affine) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"aten.mul.Tensor", b"aten.mulled.Tensor"))
    path.write_bytes(content.getvalue())
    with pytest.raises(EngineError, match=r"cannot load .*aten\.mulled.*; export it again with this torch"):
        TorchExportRuntime(path, device="cpu", trusted=True)
    assert capfd.readouterr() == ("", "")  # torch logs a traceback


class TestTrust:
    """A .pt2 file runs code when it is opened."""

    @pytest.fixture
    def trap(self, tmp_path: Path, affine: Path) -> Path:
        """A program whose sample inputs are a pickle that leaves a mark."""

        class Payload:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "sprung",)

        pickle = io.BytesIO()
        torch.save((Payload(),), pickle)
        path = tmp_path / "trap.pt2"
        with zipfile.ZipFile(affine) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                sample = "sample_inputs" in name
                new.writestr(name, pickle.getvalue() if sample else old.read(name))
        return path

    def test_a_trap_springs_when_it_is_trusted(self, trap: Path) -> None:
        with contextlib.suppress(EngineError):  # made by pytest of a mistake in torch's own log line
            TorchExportRuntime(trap, device="cpu", trusted=True)
        assert (trap.parent / "sprung").exists()

    def test_without_a_manifest_it_is_not_opened(self, trap: Path) -> None:
        with pytest.raises(EngineError, match=r"has no manifest: a \.pt2 file is code.*tools/manifest\.py"):
            TorchExportRuntime(trap, device="cpu")
        with pytest.raises(EngineError, match=r"has no manifest: a \.pt2 file is code"):
            open_engine(trap, device="cpu", frontend="fairmot")
        assert not (trap.parent / "sprung").exists()

    def test_exchanged_after_its_manifest_it_is_not_opened(self, trap: Path, fairmot: Path) -> None:
        shutil.copy(manifests.beside(fairmot), manifests.beside(trap))
        with pytest.raises(EngineError, match="is not the file its manifest"):
            open_engine(trap, device="cpu")
        assert not (trap.parent / "sprung").exists()


@pytest.fixture(scope="module")
def network() -> FairMOT:
    config = FairMOTConfig(
        width=0.125, max_channels=16, levels=(1, 1, 1, 1, 1, 1), head_channels=8, embedding=8
    )
    model = random_fairmot(config)
    with torch.no_grad():
        model.wh[2].bias.fill_(5)  # boxes, not boxes inside out
    return model


@pytest.fixture(scope="module")
def fairmot(network: FairMOT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FairMOT and its manifest, for images of 96×64."""
    path = saved(tmp_path_factory.mktemp("fairmot") / "a.pt2", network, torch.rand(2, 3, 64, 96), most=3)
    manifests.write(describe(path, frontend="fairmot"), manifests.beside(path))
    return path


@pytest.fixture(scope="module")
def onnx(network: FairMOT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network as an ONNX file."""
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    export_fairmot(
        network, path, ExportConfig(size=(96, 64), heads="raw", batch=None), generated_frames((162, 90))
    )
    return path


class TestFairmot:
    def test_finds_what_the_onnx_file_finds(self, fairmot: Path, onnx: Path) -> None:
        frames: list[Frame] = generated_frames((162, 90), count=3)
        found = {}
        for path in (fairmot, onnx):
            front, manifest = open_engine(path, device="cpu", conf=1e-6)
            assert manifest.frontend == "fairmot"
            assert front.max_batch >= 3
            found[path.suffix] = front.submit(frames).result()
            front.close()
        for mine, other in zip(found[".pt2"], found[".onnx"], strict=True):
            assert len(mine) == len(other) > 10
            np.testing.assert_allclose(mine.xyxy, other.xyxy, atol=1e-2)
            np.testing.assert_allclose(mine.score, other.score, atol=1e-4)
            np.testing.assert_allclose(mine.embedding, other.embedding, atol=1e-3)

    def test_tracks_what_the_onnx_file_tracks(self, fairmot: Path, onnx: Path, tmp_path: Path) -> None:
        clip = write_clip(tmp_path / "clip.mp4", frames=8, size=(96, 64))
        rows: dict[str, list[list[float]]] = {}
        for path in (fairmot, onnx):
            run = tracker.track(clip, engine=path, device="cpu", conf=0.1)
            tracks = ((frame.index, track) for frame, seen in run for track in seen)
            rows[path.suffix] = [[index, track.id, *track.xyxy.tolist()] for index, track in tracks]
        assert len(rows[".pt2"]) > 10
        np.testing.assert_allclose(rows[".pt2"], rows[".onnx"], atol=0.05)

    def test_threads_are_not_for_it(self, fairmot: Path) -> None:
        with pytest.raises(ConfigError, match=r"threads is 2; it is for \.onnx files alone"):
            open_engine(fairmot, device="cpu", threads=2)


def test_what_programs_hold_by_name_is_known_where_they_are_opened() -> None:
    """In a process of its own: tests have imported it all."""
    code = "import torch, tracker.runtimes.torch_export; operators = torch.ops.tracker; "
    code += "operators.deform_conv2d.default; operators.last_layer.default"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
def test_a_device_that_is_none(affine: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="it must be auto, cpu, cuda or cuda:N"):
        TorchExportRuntime(affine, device=device, trusted=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_never_replaced_in_silence(affine: Path) -> None:
    with pytest.raises(EngineError, match=r"device cuda:0 asked for, but torch sees 0 .*--device cpu"):
        TorchExportRuntime(affine, device="cuda:0", trusted=True)


@pytest.mark.filterwarnings("default")  # torch's compiler warns about what it does
def test_on_a_gpu_programs_are_compiled_and_captured(affine: Path, gpu: torch.device) -> None:
    runtime = TorchExportRuntime(affine, trusted=True)
    lane = runtime.lane()
    graphs = Graphs(lane.enqueue, gpu)
    for count in (4, 1, 3, 2, 4):
        x = torch.rand(count, 3, device=gpu)
        lane.inputs["x"][:count] = x
        torch.testing.assert_close(graphs(count), {"double": 2 * x, "sum": x.sum(1)})
    assert graphs.problem is None
    assert runtime.problems == ()


def test_what_cannot_be_compiled_runs_as_it_is(affine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Tensor) -> None:
        raise RuntimeError("no Triton here\nfor further advice see elsewhere")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    runtime = TorchExportRuntime(affine, device="cpu", trusted=True, compiled=True)
    assert runtime.run({"x": torch.ones(1, 3)})["sum"].tolist() == [3]
    assert runtime.description.endswith("on cpu, not compiled: no Triton here")
