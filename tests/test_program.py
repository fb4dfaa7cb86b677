"""FairMOT as .pt2 files: the network put together for a GPU, exported, opened and tracking as before."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from tracker import manifest as manifests
from tracker.deploy.export import frames_of, generated_frames
from tracker.deploy.program import ProgramConfig, check, export_program
from tracker.engine import open_engine
from tracker.errors import ConfigError, EngineError, SinkError
from tracker.models.checkpoint import save_fairmot
from tracker.models.deployed import Deployed, relative_errors
from tracker.models.fairmot import FairMOT, FairMOTConfig, random_fairmot
from tracker.models.folded import folded
from tracker.runtimes.torch_export import TorchExportRuntime
from tracker.types import Frame

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (96, 64)
SMALL: dict[str, Any] = {
    "width": 0.25,
    "max_channels": 48,
    "levels": (1, 1, 1, 1, 1, 1),
    "head_channels": 8,
    "embedding": 8,
}
NETWORKS = {
    "deformable": {},
    "two classes": {"classes": 2, "box": 2},
    "channels the kernel does not take": {"width": 0.125, "max_channels": 24},
    "plain convolutions": {"deformable": False, "stem_stride": 2},
}
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3}


def network(**about: Any) -> FairMOT:
    """Random, with offsets of some pixels and boxes that are not inside out."""
    model = random_fairmot(FairMOTConfig(**{**SMALL, **about}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "conv_offset_mask" in name:
                weight[:18] *= 3
        model.wh[2].bias.fill_(5)
    return model


@pytest.fixture(scope="module")
def model() -> FairMOT:
    return network()


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return generated_frames((162, 90), count=3)


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answers(module: nn.Module, given: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = module(given.to(memory_format=torch.channels_last))
    return found


class TestNetwork:
    def test_folded_it_answers_the_same_without_a_normalisation(self, model: FairMOT) -> None:
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        plain = folded(model)
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())
        assert max(relative_errors(answers(plain, images()), answers(model, images())).values()) < 1e-6
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    @pytest.mark.parametrize("about", NETWORKS.values(), ids=NETWORKS)
    def test_put_together_for_a_gpu_it_answers_the_same(
        self, about: dict[str, Any], dtype: torch.dtype
    ) -> None:
        model = network(**about)
        found = answers(Deployed(model, dtype), images().to(dtype))
        expected = answers(model, images())
        assert {name: head.shape for name, head in found.items()} == {
            name: head.shape for name, head in expected.items()
        }
        assert max(relative_errors(found, expected).values()) < LIMITS[dtype]

    def test_single_channels_are_enlarged_alike_without_zeros_between(self, model: FairMOT) -> None:
        dense, single = (Deployed(model, torch.float32, dense_upsampling=each) for each in (True, False))
        errors = relative_errors(answers(dense, images()), answers(single, images()))
        assert max(errors.values()) < 1e-6
        counts = [sum(weight.numel() for weight in each.parameters()) for each in (dense, single)]
        assert counts[0] > counts[1]

    def test_no_layer_sees_the_image_at_its_full_size(self, model: FairMOT) -> None:
        seen: list[tuple[int, ...]] = []
        deployed = Deployed(model, torch.float32)
        for layer in deployed.base.modules():
            if not list(layer.children()):
                layer.register_forward_hook(lambda layer, given, answer: seen.append(tuple(answer.shape[2:])))
        answers(deployed, images())
        height, width = images().shape[2:]
        assert seen and all(size[0] <= height // 2 and size[1] <= width // 2 for size in seen)

    def test_heat_maps_stay_in_fp32_and_with_them_their_last_layer(self, model: FairMOT) -> None:
        deployed = Deployed(model)
        found = answers(deployed, images().half())
        assert {name: head.dtype for name, head in found.items()} == {
            "hm": torch.float32, "wh": torch.float16, "reg": torch.float16, "id": torch.float16
        }  # fmt: skip
        assert Counter(weight.dtype for weight in deployed.parameters())[torch.float32] == 3
        # Scores as near to each other as FP16 cannot tell are still two scores.
        close = found["hm"].sort().values.diff()
        assert bool(((close > 0) & (close < 2.0**-11)).any())


Tool = Callable[[Sequence[str]], int]


@pytest.fixture(scope="module")
def tool() -> Tool:
    main: Tool = runpy.run_path(str(ROOT / "tools" / "export.py"))["main"]
    return main


@pytest.fixture(scope="module")
def written(
    model: FairMOT, frames: list[Frame], tool: Tool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """FP16 for any batch; FP32 for three images at once, from a checkpoint."""
    folder = tmp_path_factory.mktemp("programs")
    half, full = folder / "fp16.pt2", folder / "engines" / "fp32.pt2"
    done = export_program(model, half, ProgramConfig(size=SIZE, batch=None), frames)
    assert done.errors.keys() == {"hm", "wh", "reg", "id"}
    assert 0 < max(done.errors.values()) < 5e-3
    assert done.bytes == half.stat().st_size
    save_fairmot(model, folder / "a.pth", epoch=1)
    command = ["fairmot", "--weights", str(folder / "a.pth"), "--out", str(full), "--size", "64x96"]
    assert tool([*command, "--batch", "3", "--precision", "fp32", "--names", "walker"]) == 0
    return {"fp16": half, "fp32": full}


class TestFile:
    def test_is_described(self, written: dict[str, Path]) -> None:
        for (precision, path), name in zip(written.items(), ("person", "walker"), strict=True):
            manifest = manifests.read(manifests.beside(path))
            manifest.verify(path)
            assert (manifest.frontend, manifest.precision) == ("fairmot", precision)
            assert (manifest.input.size, manifest.names) == (SIZE, (name,))
            assert manifest.outputs == {role: role for role in ("hm", "wh", "reg", "id")}
            assert manifest.onnx_sha256 == manifest.engine_sha256
            assert not [each for each in path.parent.iterdir() if each.name.startswith(".")]

    def test_is_convolutions_and_the_fused_operator(self, written: dict[str, Path]) -> None:
        graph = torch.export.load(written["fp16"]).graph
        kinds = Counter(node.target for node in graph.nodes if node.op == "call_function")
        assert kinds[torch.ops.tracker.deform_conv2d.default] == 16
        assert not any("norm" in str(kind) or "grid" in str(kind) for kind in kinds)

    @pytest.mark.parametrize(("precision", "least", "most"), [("fp16", 1, 8), ("fp32", 3, 3)])
    def test_takes_its_batches_in_its_own_precision(
        self, written: dict[str, Path], model: FairMOT, precision: str, least: int, most: int
    ) -> None:
        runtime = TorchExportRuntime(written[precision], device="cpu", trusted=True)
        assert runtime.signature.batch == (least, most)
        assert runtime.dtypes["images"] == {"fp16": torch.float16, "fp32": torch.float32}[precision]
        assert runtime.signature.inputs["images"].channels_last
        for count in {least, 3}:
            found = runtime.run({"images": images(count)})
            assert max(relative_errors(found, answers(model, images(count))).values()) < 5e-3

    def test_finds_what_the_network_finds(self, written: dict[str, Path], frames: list[Frame]) -> None:
        found = {}
        for precision, path in written.items():
            front, _ = open_engine(path, device="cpu", conf=1e-3)
            found[precision] = front.submit(frames).result()
            front.close()
        for half, full in zip(found["fp16"], found["fp32"], strict=True):
            assert len(full) > 10
            assert abs(len(half) - len(full)) <= 2
            nearest = np.abs(half.xyxy[:, None] - full.xyxy).max(2).min(0)  # for each of full's
            assert np.quantile(nearest, 0.9) < 0.1

    def test_opens_in_a_process_that_knows_no_networks(self, written: dict[str, Path]) -> None:
        script = """
import sys
from pathlib import Path
from tracker.engine import open_engine
front, manifest = open_engine(Path(sys.argv[1]), device="cpu")
print(manifest.precision, front.max_batch, [name for name in sys.modules if "tracker.models" in name])
"""
        command = [sys.executable, "-c", script, str(written["fp16"])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "fp16 8 []", done.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"size": (100, 64)}, "size is 100×64; both sides must be multiples of 32"),
        ({"batch": 0}, "batch is 0; it must be at least 1, or dynamic"),
        ({"precision": "int8"}, "precision is 'int8'; a .pt2 file has fp32 or fp16"),
        ({"names": ("person", "car")}, "the network has 1 classes, 2 are named"),
    ],
    ids=str,
)
def test_impossible_exports(
    tmp_path: Path, model: FairMOT, frames: list[Frame], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        export_program(model, tmp_path / "a.pt2", ProgramConfig(**{"size": SIZE, **config}), frames)


def test_places_that_are_none(tmp_path: Path, model: FairMOT, frames: list[Frame]) -> None:
    with pytest.raises(ConfigError, match=r"a\.pth is no name for a torch program: end it in \.pt2"):
        export_program(model, tmp_path / "a.pth", ProgramConfig(size=SIZE), frames)
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match="cannot write"):
        export_program(model, tmp_path / "file" / "a.pt2", ProgramConfig(size=SIZE), frames)


def test_weights_that_overflow_in_fp16_leave_the_old_file(tmp_path: Path, frames: list[Frame]) -> None:
    loud, out = network(), tmp_path / "a.pt2"
    with torch.no_grad():
        loud.id[0].weight.mul_(1e6)
        loud.id[2].weight.mul_(1e-6)
    out.write_bytes(b"the old one")
    with pytest.raises(EngineError, match=r"NaN or inf|differs by"):
        export_program(loud, out, ProgramConfig(size=SIZE), frames)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]
    assert out.read_bytes() == b"the old one"


@pytest.mark.parametrize("error", [0.06, float("nan")])
def test_another_answer_is_refused(error: float) -> None:
    check({"hm": 0.04, "id": 0.001}, "fp16")
    with pytest.raises(EngineError, match=r"in fp16 the output id differs by .* more than 5\.0%: nothing"):
        check({"hm": 0.04, "id": error}, "fp16")


class TestTool:
    def test_the_shipped_model_becomes_one_and_finds_the_same(self, tmp_path: Path, tool: Tool) -> None:
        """Its checkpoint is gone: the weights are those in the ONNX file."""
        shipped, out = ROOT / "engines" / "fairmot_demo.onnx", tmp_path / "demo.pt2"
        assert tool(["fairmot", "--weights", str(shipped), "--out", str(out), "--precision", "fp32"]) == 0
        (before, after) = (manifests.read(manifests.beside(path)) for path in (shipped, out))
        assert (after.input, after.names) == (before.input, before.names)
        assert after.onnx_sha256 == before.onnx_sha256
        (frame,), found = frames_of(str(ROOT / "videos" / "demo.mp4"), count=1), {}
        for path in (shipped, out):
            front, _ = open_engine(path, device="cpu")
            (found[path.suffix],) = front.submit([frame]).result()
            front.close()
        mine, other = found[".pt2"], found[".onnx"]
        assert len(mine) == len(other) > 5
        np.testing.assert_allclose(mine.score, other.score, atol=1e-4)
        np.testing.assert_allclose(mine.xyxy, other.xyxy, atol=1e-2)
        np.testing.assert_allclose(mine.embedding, other.embedding, atol=1e-3)

    @pytest.mark.parametrize(
        ("out", "option", "words"),
        [
            ("a.pt2", "--raw", "--raw is not for .pt2 files: leave it out"),
            ("a.pt2", "--lower-deform", "--lower-deform is not for .pt2 files"),
            ("a.onnx", "--precision=fp16", "--precision is not for .onnx files"),
        ],
    )
    def test_options_of_the_other_kind(
        self,
        tmp_path: Path,
        tool: Tool,
        capsys: pytest.CaptureFixture[str],
        out: str,
        option: str,
        words: str,
    ) -> None:
        assert tool(["fairmot", "--random", "--out", str(tmp_path / out), option]) == 1
        assert words in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")  # torch's compiler warns about what it does
def test_on_a_gpu_programs_made_without_one_are_compiled_and_captured(
    gpu: torch.device, written: dict[str, Path], model: FairMOT
) -> None:
    runtime = TorchExportRuntime(written["fp16"], trusted=True)
    for count in (1, 3, 8):
        found = {name: head.cpu() for name, head in runtime.run({"images": images(count)}).items()}
        assert max(relative_errors(found, answers(model, images(count))).values()) < 5e-3
    assert runtime.problems == ()
