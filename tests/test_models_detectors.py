"""Detectors' networks: the official ones' parameters and answers, and exports that runtimes take.

tests/data/official_networks.json holds what the official repositories' own networks (YOLOX, mmdet 3.3,
mmrotate 1.x, PaddleDetection, facebookresearch/detr) answer with the weights of `official_cases.fill`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from official_cases import fill, filled, images, sample

from tracker.deploy.build import build
from tracker.deploy.calibration.calibrate import CalibrationConfig, calibrate
from tracker.deploy.detectors import DetectorExport, export_detector
from tracker.deploy.export import generated_frames, inputs_of
from tracker.deploy.plan import BuildConfig
from tracker.engine import open_engine
from tracker.errors import CheckpointError, ConfigError, EngineError
from tracker.manifest import Precision
from tracker.models.blocks import ConvBN, FocusConv
from tracker.models.checkpoint import read_checkpoint
from tracker.models.zoo import NAMES, NETWORKS, load_detector, network_of, random_detector
from tracker.pixels import to_bgr
from tracker.runtimes.onnx import OnnxRuntime
from tracker.runtimes.trt import trt_module

pytestmark = pytest.mark.usefixtures("one_thread")

OFFICIAL = json.loads((Path(__file__).parent / "data" / "official_networks.json").read_text(encoding="utf-8"))
SMALL = {
    "yolox-nano": {},
    "rtmdet-tiny": {},
    "rtmdet-r-tiny": {},
    "ppyoloe-plus-s": {},
    "detr-r50": {"layers": 1, "hidden": 64, "queries": 10},
    "maskrcnn-r50": {"channels": 32, "hidden": 64, "convolutions": 2},
}
SIZE = (96, 64)
STREET = (160, 96)  # of pictures


@pytest.mark.parametrize("name", OFFICIAL)
def test_answers_are_those_of_the_official_network(name: str) -> None:
    """Same parameters by name and shape; with the same weights, the same answers."""
    network, config = network_of(name)
    model = network.build(config, (64, 96))
    state = {
        key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    listed = "\n".join(sorted(f"{key} {tuple(value.shape)}" for key, value in state.items()))
    assert len(state) == OFFICIAL[name]["tensors"]
    assert hashlib.sha256(listed.encode()).hexdigest() == OFFICIAL[name]["keys"]
    with torch.no_grad():
        answers = filled(model)(images(network.brightest))
    assert answers.keys() == OFFICIAL[name]["outputs"].keys()
    for role, expected in OFFICIAL[name]["outputs"].items():
        scale = max(map(abs, expected))
        np.testing.assert_allclose(sample(answers[role]), expected, rtol=0, atol=1e-4 * scale)


def test_a_convolution_over_stacked_pixels_is_one_over_the_image() -> None:
    conv, image = FocusConv(3, 5), torch.randn(2, 3, 12, 16)
    blocks = [image[..., y::2, x::2] for x in (0, 1) for y in (0, 1)]
    expected = torch.nn.functional.conv2d(torch.cat(blocks, dim=1), conv.weight, padding=1)
    torch.testing.assert_close(conv(image), expected)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family with random weights, small, its batch left open."""
    directory = tmp_path_factory.mktemp("detectors")
    files = {}
    for name, changes in SMALL.items():
        files[name] = directory / f"{name}.onnx"
        config = DetectorExport(name=name, size=SIZE, batch=None)
        model = random_detector(name, SIZE, **changes)
        done = export_detector(model, files[name], config, generated_frames(SIZE, 2))
        assert done.manifest.frontend == network_of(name)[0].frontend
    return files


def test_every_family_is_exported() -> None:
    elsewhere = {"solov2", "solov2-light"}  # test_solov2.py
    assert {NAMES[name][0] for name in SMALL} | elsewhere == NETWORKS.keys()


@pytest.mark.parametrize("name", SMALL)
def test_exports_are_whole_detectors(exported: dict[str, Path], name: str) -> None:
    """Written, described, opened, and fed frames of two sizes in one batch."""
    frontend, manifest = open_engine(exported[name], conf=0.3)
    try:
        found = frontend.submit([*generated_frames((160, 90), 1), *generated_frames((64, 64), 1)]).result()
    finally:
        frontend.close()
    assert len(found) == 2
    assert frontend.max_batch > 1 and manifest.input.size == SIZE


@pytest.mark.parametrize("name", SMALL)
def test_exports_hold_nothing_that_int8_or_old_runtimes_refuse(exported: dict[str, Path], name: str) -> None:
    model = onnx.load(exported[name])
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Where", "Gather", "Cast", "CumSum", "Not", "NonMaxSuppression", "TopK", "If", "Loop"}
    assert model.opset_import[0].version >= 17
    assert all(node.domain == "" for node in model.graph.node)
    entries = (*model.graph.input, *model.graph.output)
    batches = {entry.name: entry.type.tensor_type.shape.dim[0].dim_param for entry in entries}
    assert batches["images"] == "batch" and all(batches.values())


def test_shared_convolutions_keep_their_own_normalisations(exported: dict[str, Path]) -> None:
    """RTMDet's levels share weights, but not what is folded into them."""
    names = [weight.name for weight in onnx.load(exported["rtmdet-tiny"]).graph.initializer]
    assert (
        sum(name.startswith("bbox_head.cls_convs.0.0.conv") for name in names) == 6
    )  # weight, bias; 3 levels


@pytest.mark.parametrize("precision", [None, "fp16"])
@pytest.mark.parametrize("name", SMALL)
def test_tensorrt_builds_every_export(
    exported: dict[str, Path], tmp_path: Path, name: str, precision: Precision | None
) -> None:
    try:
        trt_module("tensorrt_rtx")
    except EngineError as error:
        pytest.skip(str(error))
    config = BuildConfig(builder="tensorrt_rtx", batch=(1, 2, 4))
    build(exported[name], tmp_path / "x.engine", config, precision=precision)
    assert (tmp_path / "x.engine").stat().st_size > 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two to calibrate with."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, frame in enumerate(generated_frames(STREET, 2)):
        cv2.imwrite(str(folder / f"{index}.png"), to_bgr(frame.image))
    return folder


@pytest.mark.parametrize("name", SMALL)
def test_every_export_is_quantised(
    exported: dict[str, Path], pictures: Path, tmp_path: Path, name: str
) -> None:
    """DETR as well: without boolean masks INT8 has nothing to stumble over. ONNX Runtime answers much the
    same; TensorRT-RTX builds a transformer and a pyramid."""
    out = tmp_path / "x.onnx"
    done = calibrate(exported[name], out, [pictures], CalibrationConfig(frames=2))
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(out).graph.node}
    assert done.bytes[1] < 0.5 * done.bytes[0]
    image = inputs_of(done.manifest, 1, generated_frames(STREET, 1))
    exact, coarse = (OnnxRuntime(each, device="cpu").run({"images": image}) for each in (exported[name], out))
    for role, value in exact.items():
        assert torch.cosine_similarity(coarse[role].flatten(), value.flatten(), dim=0) > 0.8, role
    if name in ("detr-r50", "rtmdet-r-tiny"):
        try:
            trt_module("tensorrt_rtx")
        except EngineError as error:
            pytest.skip(str(error))
        build(out, tmp_path / "x.engine", BuildConfig(builder="tensorrt_rtx"), precision="int8")


def test_official_checkpoints_come_in_several_wrappings(tmp_path: Path) -> None:
    model = random_detector("rtmdet-tiny")
    state = model.state_dict()
    for wrapping in (state, {"state_dict": state}, {"model": state, "start_epoch": 3}):
        torch.save(wrapping, tmp_path / "weights.pth")
        loaded = load_detector("rtmdet-tiny", tmp_path / "weights.pth").state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_paddle_checkpoints_are_read_without_running_them(tmp_path: Path) -> None:
    """A pickle of arrays, statistics under Paddle's names; any other pickle is refused."""
    model = random_detector("ppyoloe-plus-s", classes=3)
    arrays = {
        key.replace("running_mean", "_mean").replace("running_var", "_variance"): value.numpy()
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    arrays["StructuredToParameterName@@"] = {"backbone.stem.conv1.conv.weight": "conv2d_0.w_0"}
    path = tmp_path / "weights.pdparams"
    path.write_bytes(pickle.dumps(arrays))
    loaded = load_detector("ppyoloe-plus-s", path)
    assert loaded.config.classes == 3
    state, expected = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected if "num_batches" not in key)
    path.write_bytes(pickle.dumps(Path("/etc/passwd")))
    with pytest.raises(CheckpointError, match=r"asks for pathlib.*nothing in it was run"):
        read_checkpoint(path)


def test_checkpoints_of_other_networks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(ConvBN(3, 3, 3).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of detr-r50: it has no class_embed\.weight"):
        load_detector("detr-r50", path)
    torch.save(random_detector("rtmdet-tiny").state_dict(), path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of rtmdet-s: of its .* of another shape"):
        load_detector("rtmdet-s", path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (100, 64)}, "size is 100×64; for rtmdet-tiny both sides must be multiples of 32"),
        ({"batch": 0}, "batch is 0"),
        ({"name": "rtmdet-xxl"}, "network is 'rtmdet-xxl'; there is yolox-nano"),
    ],
)
def test_impossible_exports(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DetectorExport(**{"name": "rtmdet-tiny", "size": SIZE} | changes)


def test_wrong_class_names_leave_no_file(tmp_path: Path) -> None:
    model = random_detector("rtmdet-tiny", SIZE, classes=3)
    config = DetectorExport(name="rtmdet-tiny", size=SIZE, names=("a", "b"))
    with pytest.raises(EngineError, match="2 class names"):
        export_detector(model, tmp_path / "x.onnx", config, generated_frames(SIZE, 1))
    assert not list(tmp_path.iterdir())


def test_weights_come_from_names_alone() -> None:
    """What the goldens rest on."""
    first, second = {"a.weight": torch.zeros(2, 3)}, {"b": torch.zeros(1), "a.weight": torch.ones(2, 3)}
    fill(first)
    fill(second)
    assert torch.equal(first["a.weight"], second["a.weight"])
