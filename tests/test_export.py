"""FairMOT as an ONNX file: the same answers, a graph one can read, and TensorRT's own parser and builder."""

from __future__ import annotations

import functools
import importlib
import json
import runpy
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tracker import manifest as manifests
from tracker.deploy.export import (
    Export,
    ExportConfig,
    compare,
    export_fairmot,
    frames_of,
    generated_frames,
)
from tracker.deploy.graph import Lowering, to_onnx
from tracker.deploy.onnx_weights import fairmot_of_onnx
from tracker.engine import describe, open_engine
from tracker.errors import CheckpointError, ConfigError, EngineError, SinkError, SourceError
from tracker.frontends.fairmot import Fairmot, FairmotConfig, peak_scores
from tracker.frontends.preprocess import Preprocessor
from tracker.models.checkpoint import save_fairmot
from tracker.models.fairmot import FairMOT, FairMOTConfig, random_fairmot
from tracker.models.folded import folded
from tracker.runtimes.onnx import OnnxRuntime
from tracker.types import Frame, Image

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
SIZE = (96, 64)
FORMS = {
    "DeformConv": Lowering(),
    "GridSample": Lowering(deform="GridSample"),
    "depthwise": Lowering(dense_upsampling=False),
}


@pytest.fixture(scope="module")
def model() -> FairMOT:
    """Everything the full-size network is made of, an eighth as wide."""
    model = random_fairmot(FairMOTConfig(width=0.125, max_channels=24, head_channels=8, embedding=8))
    with torch.no_grad():
        model.wh[2].bias.fill_(5)  # boxes, not boxes inside out
    return model


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return generated_frames((162, 90), count=2)


def export(model: FairMOT, out: Path, frames: Sequence[Frame], **config: Any) -> Export:
    return export_fairmot(model, out, ExportConfig(**{"size": SIZE, **config}), frames)


Exported = Callable[..., tuple[Path, Export]]


@pytest.fixture(scope="module")
def exported(model: FairMOT, frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The model in one of FORMS, with peaks or raw heads; written once."""

    @functools.cache
    def write(form: str = "DeformConv", heads: str = "peaks") -> tuple[Path, Export]:
        out = tmp_path_factory.mktemp("exported") / f"{form}.onnx"
        return out, export(model, out, frames, lowering=FORMS[form], heads=heads)

    return write


def answers(path: Path, images: Tensor) -> dict[str, Tensor]:
    return OnnxRuntime(path, device="cpu").run({"images": images})


class TestAnswers:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_is_the_network(self, model: FairMOT, exported: Exported, form: str) -> None:
        path, done = exported(form, "raw")
        assert done.errors.keys() == {"hm", "wh", "reg", "id"}
        assert 0 < max(done.errors.values()) < 1e-4
        images = torch.rand(1, 3, 64, 96)
        with torch.no_grad():
            expected = model(images)
        for role, answer in answers(path, images).items():
            torch.testing.assert_close(answer, expected[role], rtol=0, atol=1e-4)

    def test_peaks_are_those_of_the_front_end(self, exported: Exported) -> None:
        images = torch.rand(1, 3, 64, 96)
        raw, peaks = (answers(exported("DeformConv", heads)[0], images) for heads in ("raw", "peaks"))
        torch.testing.assert_close(peaks["peaks"], peak_scores(raw["hm"]), rtol=0, atol=1e-6)
        assert 0 < int((peaks["peaks"] > 0).sum()) < peaks["peaks"].numel() / 2
        for role in ("wh", "reg", "id"):
            assert torch.equal(peaks[role], raw[role])

    @pytest.mark.parametrize("form", ["DeformConv", "GridSample"])
    def test_an_open_batch_takes_any(
        self, tmp_path: Path, model: FairMOT, frames: list[Frame], form: str
    ) -> None:
        export(model, tmp_path / "a.onnx", frames, lowering=FORMS[form], batch=None)
        assert OnnxRuntime(tmp_path / "a.onnx").inputs == {"images": (None, 3, 64, 96)}
        images = torch.rand(3, 3, 64, 96)
        together = answers(tmp_path / "a.onnx", images)["id"]
        alone = torch.cat([answers(tmp_path / "a.onnx", image[None])["id"] for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)

    def test_plain_convolutions_and_classes(self, tmp_path: Path, frames: list[Frame]) -> None:
        small = random_fairmot(
            FairMOTConfig(classes=2, width=0.125, head_channels=8, deformable=False, stem_stride=2)
        )
        done = export(small, tmp_path / "a.onnx", frames, names=("person", "car"), batch=2)
        assert done.manifest.names == ("person", "car")
        assert "DeformConv" not in Counter(node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node)

    def test_real_frames(self, tmp_path: Path, model: FairMOT, data: Path) -> None:
        real = frames_of(str(data / "pets09" / "video.mp4"), count=2)
        done = export(model, tmp_path / "a.onnx", real, size=(160, 96))
        front = Fairmot(OnnxRuntime(tmp_path / "a.onnx"), done.manifest, FairmotConfig(conf=1e-6))
        try:
            (found,) = front.submit(real[:1]).result()
        finally:
            front.close()
        assert len(found) > 10
        np.testing.assert_allclose(np.linalg.norm(found.embedding, axis=1), 1, rtol=1e-5)


class TestEngine:
    """What is written opens as any engine does."""

    def test_tracks_boxes_as_ours_or_the_official(self, exported: Exported, frames: list[Frame]) -> None:
        found = {}
        for compat in (None, "fairmot"):
            front, manifest = open_engine(exported()[0], conf=1e-6, compat=compat, threads=1)
            found[compat] = front.submit(frames[:1]).result()[0]
            front.close()
            assert (manifest.frontend, front.embeds) == ("fairmot", True)
        assert len(found[None]) > 10
        shift = found["fairmot"].xyxy - found[None].xyxy  # 162×90 is resized to 96×53, not to 96×53.3
        np.testing.assert_allclose(shift[:, ::2], 0, atol=1e-3)
        assert 0.1 < np.abs(shift[:, 1::2]).max() < 2

    def test_is_described_as_a_users_own(self, exported: Exported) -> None:
        path, done = exported()
        assert describe(path, frontend="fairmot") == done.manifest
        assert describe(path, frontend="fairmot", names=("walker",)).names == ("walker",)
        with pytest.raises(ConfigError, match="for fairmot it has but one: leave it out"):
            describe(path, frontend="fairmot", layout="decoded")

    def test_pixels_are_means_of_what_they_cover(self, exported: Exported) -> None:
        """The official INTER_AREA: every other pixel alight at twice the size is grey, not black or white."""
        stripes = np.zeros((128, 192, 3), np.uint8)
        stripes[:, ::2] = 200
        image = Image(format="bgr", planes=(stripes,))
        shot = Frame(index=0, pts_seconds=0.0, size=(192, 128), image=image)
        tensor, _ = Preprocessor(exported()[1].manifest.input, 1)([shot])
        np.testing.assert_allclose(tensor, 100 / 255, rtol=1e-6)


class TestGraph:
    @pytest.mark.parametrize("form", FORMS)
    def test_is_made_of_few_operators(self, exported: Exported, form: str) -> None:
        graph = onnx.load(exported(form)[0]).graph
        plain = {
            "Conv",
            "ConvTranspose",
            "Relu",
            "Add",
            "Concat",
            "MaxPool",
            "Split",
            "Sigmoid",
            "Greater",
            "Where",
        }
        lowered = {"Reshape", "Transpose", "GridSample", "Mul"}
        assert {node.op_type for node in graph.node} == plain | (
            lowered if form == "GridSample" else {"DeformConv"}
        )

    @pytest.mark.parametrize("heads", ["peaks", "raw"])
    def test_nodes_are_called_as_layers(self, exported: Exported, heads: str) -> None:
        graph = onnx.load(exported("DeformConv", heads)[0]).graph
        kinds = {node.name: node.op_type for node in graph.node}
        assert len(kinds) == len(graph.node)
        assert kinds["base.level3.tree2.tree1.conv1"] == "Conv"
        assert kinds["dla_up.ida_0.proj_1.conv"] == "DeformConv"
        assert kinds["ida_up.up_2"] == "ConvTranspose"
        weights = {tensor.name for tensor in graph.initializer}
        assert {"hm.2.weight", "ida_up.node_2.conv.bias"} <= weights
        assert not any(".bn1." in name or ".actf." in name for name in weights)  # folded

    def test_unknown_layers_are_refused(self) -> None:
        class Foreign(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU())

            def forward(self, images: Tensor) -> dict[str, Tensor]:
                return {"answer": self.body(images)}

        with pytest.raises(NotImplementedError, match=r"how to write .*body\.1"):
            to_onnx(
                Foreign().eval(), torch.zeros(1, 3, 8, 8), Lowering(), input_name="images", open_batch=False
            )


class TestWeights:
    """An ONNX file is a checkpoint too, where no other is left."""

    @pytest.mark.parametrize("form", ["DeformConv", "depthwise"])
    @pytest.mark.parametrize("heads", ["peaks", "raw"])
    def test_are_the_networks_own_folded(
        self, model: FairMOT, exported: Exported, form: str, heads: str
    ) -> None:
        again = fairmot_of_onnx(exported(form, heads)[0])
        assert again.config == model.config
        expected = folded(model).state_dict()
        assert again.state_dict().keys() == expected.keys()
        for name, weight in again.state_dict().items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize(
        "about",
        [
            {"width": 0.3, "levels": (2, 3, 1, 2, 3, 1), "deformable": False, "stem_stride": 2},
            {"width": 1.3, "max_channels": 40, "classes": 3, "box": 2},
        ],
        ids=str,
    )
    def test_say_what_network_it_is(self, tmp_path: Path, about: dict[str, Any]) -> None:
        config = FairMOTConfig(**{"head_channels": 8, "embedding": 8, **about})
        example, options = torch.zeros(1, 3, 32, 32), {"input_name": "images", "open_batch": True}
        onnx.save(to_onnx(random_fairmot(config), example, Lowering(), **options), tmp_path / "a.onnx")
        found = fairmot_of_onnx(tmp_path / "a.onnx").config
        assert found.channels == config.channels
        for key in ("classes", "embedding", "box", "levels", "stem_stride", "head_channels", "deformable"):
            assert getattr(found, key) == getattr(config, key)

    def test_of_the_shipped_model(self) -> None:
        config = fairmot_of_onnx(ROOT / "engines" / "fairmot_demo.onnx").config
        assert (config.classes, config.channels) == (2, (8, 16, 32, 64, 96, 96))

    def test_of_other_files_are_refused(self, tmp_path: Path, exported: Exported) -> None:
        with pytest.raises(CheckpointError, match="was lowered or quantised"):
            fairmot_of_onnx(exported("GridSample")[0])
        other = onnx.load(exported()[0])
        del other.graph.initializer[:]
        onnx.save(other, tmp_path / "other.onnx")
        with pytest.raises(CheckpointError, match="holds no FairMOT in fp32 as tools"):
            fairmot_of_onnx(tmp_path / "other.onnx")
        (tmp_path / "cut.onnx").write_bytes(exported()[0].read_bytes()[:5000])
        with pytest.raises(CheckpointError, match="is no ONNX file or is cut short"):
            fairmot_of_onnx(tmp_path / "cut.onnx")
        with pytest.raises(CheckpointError, match="cannot read"):
            fairmot_of_onnx(tmp_path / "missing.onnx")


@pytest.fixture(scope="module")
def trt() -> Any:
    try:
        return importlib.import_module("tensorrt_rtx_bindings")
    except ImportError as error:
        pytest.skip(f"TensorRT-RTX cannot be imported ({error}): pip install tensorrt-rtx-cu13-bindings")


class TestTensorRt:
    """The real parser and builder: TensorRT-RTX does both without a GPU."""

    def build(self, trt: Any, path: Path) -> tuple[Any, list[str]]:
        """The plan, None where it does not parse or build; and what the parser said."""
        logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network()
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(path.read_bytes()):
            return None, [parser.get_error(index).desc() for index in range(parser.num_errors)]
        return builder.build_serialized_network(network, builder.create_builder_config()), []

    @pytest.mark.parametrize("heads", ["peaks", "raw"])
    def test_builds_the_lowered_form(self, exported: Exported, trt: Any, heads: str) -> None:
        plan, complaints = self.build(trt, exported("GridSample", heads)[0])
        assert complaints == []
        assert plan is not None

    def test_does_not_know_the_other(self, exported: Exported, trt: Any) -> None:
        """When this fails, TensorRT-RTX has learnt DeformConv, and lowering is no longer needed for it."""
        plan, complaints = self.build(trt, exported()[0])
        assert plan is None
        assert complaints


class TestVerification:
    def heads(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return {name: torch.randn(1, 2, 8, 8) for name in ("hm", "wh", "reg", "id")}

    def test_measures_each_output(self) -> None:
        heads = self.heads()
        errors = compare(heads, {**heads, "wh": heads["wh"] + 5e-5})
        assert errors == {"hm": 0, "wh": pytest.approx(5e-5, rel=0.02), "reg": 0, "id": 0}

    @pytest.mark.parametrize(("role", "wrong"), [("hm", 0.01), ("id", 1e-3), ("reg", float("nan"))])
    def test_refuses_another_answer(self, role: str, wrong: float) -> None:
        heads = self.heads()
        spoilt = heads[role].clone()
        spoilt[0, 1, 2, 3] += wrong
        with pytest.raises(
            EngineError, match=rf"ONNX Runtime's {role} differs from torch's by .*nothing was"
        ):
            compare(heads, {role: spoilt})

    def test_a_tie_may_fall_either_way(self) -> None:
        heads = {"hm": torch.full((1, 1, 4, 8), -5.0)}
        heads["hm"][0, 0, 2, 2:4] = torch.tensor([1.0, 1.0 + 1e-6])
        other = heads["hm"].clone()
        other[0, 0, 2, 2:4] = torch.tensor([1.0 + 1e-6, 1.0])
        assert (peak_scores(heads["hm"]) != peak_scores(other)).any()
        assert compare(heads, {"peaks": peak_scores(other)})["peaks"] < 1e-6

    def test_a_peak_elsewhere_is_none(self) -> None:
        heads = {"hm": torch.full((1, 1, 4, 8), -5.0)}
        heads["hm"][0, 0, 2, 2] = 1.0
        with pytest.raises(EngineError, match="peaks differs"):
            compare(heads, {"peaks": peak_scores(heads["hm"].flip(3))})

    def test_weights_that_overflow_leave_no_file(self, tmp_path: Path, frames: list[Frame]) -> None:
        broken = random_fairmot(FairMOTConfig(width=0.125, head_channels=8))
        with torch.no_grad():
            for layer in (broken.wh[0], broken.wh[2]):
                layer.weight.mul_(1e30)
        out = tmp_path / "a.onnx"
        out.write_bytes(b"the old one")
        with pytest.raises(EngineError, match="NaN or inf"):
            export(broken, out, frames)
        assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
        assert out.read_bytes() == b"the old one"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"size": (100, 64)}, "size is 100×64; both sides must be multiples of 32"),
        ({"size": (0, 64)}, "size is 0×64"),
        ({"batch": 0}, "batch is 0; it must be at least 1, or dynamic"),
        ({"names": ("person", "car")}, "the network has 1 classes, 2 are named"),
    ],
    ids=str,
)
def test_impossible_exports(
    tmp_path: Path, model: FairMOT, frames: list[Frame], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        export(model, tmp_path / "a.onnx", frames, **config)


def test_nowhere_to_write(tmp_path: Path, model: FairMOT, frames: list[Frame]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match="cannot write"):
        export(model, tmp_path / "file" / "a.onnx", frames)


def test_nothing_to_check_with(tmp_path: Path, model: FairMOT) -> None:
    with pytest.raises(ConfigError, match="no frame to check the export with"):
        export(model, tmp_path / "a.onnx", [])
    with pytest.raises(SourceError):
        frames_of(str(tmp_path / "missing.mp4"))


class TestTool:
    @pytest.fixture
    def tool(self) -> Callable[[Sequence[str]], int]:
        return runpy.run_path(str(ROOT / "tools" / "export.py"))["main"]

    def test_from_checkpoint_to_engine(
        self, tmp_path: Path, model: FairMOT, tool: Callable[[Sequence[str]], int], capsys: Any
    ) -> None:
        save_fairmot(model, tmp_path / "a.pth", epoch=1)
        out = tmp_path / "engines" / "a.onnx"
        command = ["fairmot", "--weights", str(tmp_path / "a.pth"), "--out", str(out), "--size", "64x96"]
        assert tool([*command, "--batch", "dynamic", "--raw", "--names", "walker"]) == 0
        assert "greatest differences: hm " in capsys.readouterr().out
        manifest = manifests.read(manifests.beside(out))
        manifest.verify(out)
        assert (manifest.frontend, manifest.input.size, manifest.names) == ("fairmot", SIZE, ("walker",))
        assert manifest.outputs == {"hm": "hm", "wh": "wh", "reg": "reg", "id": "id"}

    def test_a_network_described_beside_its_weights(
        self, tmp_path: Path, model: FairMOT, tool: Callable[[Sequence[str]], int]
    ) -> None:
        torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
        about = {"width": 0.125, "max_channels": 24, "head_channels": 8, "embedding": 8}
        (tmp_path / "model.json").write_text(json.dumps(about))
        command = ["fairmot", "--weights", str(tmp_path / "a.pth"), "--network", str(tmp_path / "model.json")]
        assert tool([*command, "--out", str(tmp_path / "a.onnx"), "--size", "64x96", "--lower-deform"]) == 0

    def test_from_a_file_of_its_own_at_another_batch(
        self, tmp_path: Path, exported: Exported, tool: Callable[[Sequence[str]], int], capsys: Any
    ) -> None:
        source, done = exported()
        out = tmp_path / "again.onnx"
        command = ["fairmot", "--weights", str(source), "--out", str(out), "--batch", "dynamic"]
        assert tool(command) == 0
        manifest = manifests.read(manifests.beside(out))
        assert (manifest.input, manifest.names) == (done.manifest.input, done.manifest.names)
        images = torch.rand(2, 3, 64, 96)
        for role, answer in answers(out, images).items():
            torch.testing.assert_close(answer[:1], answers(source, images[:1])[role], rtol=1e-4, atol=1e-4)
        network = tmp_path / "network.json"
        network.write_text("{}")
        assert tool([*command, "--network", str(network)]) == 1
        assert "says itself what network it is: leave out --network" in capsys.readouterr().err

    def test_errors_are_one_line(
        self, tmp_path: Path, tool: Callable[[Sequence[str]], int], capsys: Any
    ) -> None:
        (tmp_path / "a.pth").write_text("no weights")
        command = ["fairmot", "--weights", str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.onnx")]
        assert tool(command) == 1
        error = capsys.readouterr().err
        assert error.startswith("export: ") and error.count("\n") == 1
        assert not (tmp_path / "a.onnx").exists()

    @pytest.mark.parametrize(
        "options", [["--size", "big"], ["--batch", "some"], ["--weights", "a", "--random"]]
    )
    def test_wrong_usage(self, tool: Callable[[Sequence[str]], int], options: list[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            tool(["fairmot", "--out", "a.onnx", *options])
        assert stop.value.code == 2
