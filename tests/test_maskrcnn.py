"""Mask R-CNN: mmdet's own numbers, the three parts of its engine, and what happens between them.

tests/data/official_maskrcnn.json holds what mmdet 3.3's own network and post-processing answer, with mmcv's
own NMS and RoIAlign, to the weights and pictures of `maskrcnn_cases`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fake_tensorrt import fake_tensorrt, plan, tensor
from kernel_runs import PLACES, Run, run_at
from maskrcnn_cases import SIZE, picture, small, torch_engine
from numpy.typing import NDArray
from official_cases import filled, images, sample
from onnx import TensorProto, helper
from torch import Tensor

from tracker import boxes, rle
from tracker import manifest as manifests
from tracker.deploy.build import build
from tracker.deploy.detectors import DetectorExport, export_detector
from tracker.deploy.feeds import Feeds, run_parts
from tracker.deploy.plan import BuildConfig
from tracker.engine import open_engine
from tracker.errors import ConfigError, EngineError
from tracker.frontends.detector import Detector
from tracker.frontends.maskrcnn import MaskRcnn, MaskRcnnConfig
from tracker.frontends.regions import anchors, levels_of, roi_align
from tracker.kernels.roi_align import roi_align as roi_align_kernel
from tracker.models.maskrcnn import MaskRCNN
from tracker.runtimes.onnx import OnnxRuntime
from tracker.runtimes.onnx_parts import parts_of
from tracker.runtimes.parts import PartsRuntime, in_parts, pack, unpack
from tracker.runtimes.trt import trt_module
from tracker.types import Detections, Frame, Image

pytestmark = pytest.mark.usefixtures("one_thread")

OFFICIAL = json.loads((Path(__file__).parent / "data" / "official_maskrcnn.json").read_text(encoding="utf-8"))
NAMES = tuple("abcde")


def frame(pixels: NDArray[np.uint8]) -> Frame:
    height, width = pixels.shape[:2]
    image = Image(format="bgr", planes=(pixels,))
    return Frame(index=0, pts_seconds=0.0, size=(width, height), image=image)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("maskrcnn") / "small.onnx"
    config = DetectorExport(name="maskrcnn-r50", size=SIZE, batch=None, names=NAMES)
    export_detector(small(), path, config, [frame(picture(0)), frame(picture(1))])
    return path


@pytest.fixture(scope="module")
def opened(exported: Path) -> Iterator[Detector]:
    frontend, _ = open_engine(exported, conf=0.3, lanes=1)
    yield frontend
    frontend.close()


class TestBesideMmdet:
    def test_the_network_has_its_parameters_and_answers(self) -> None:
        official = OFFICIAL["network"]
        model = filled(MaskRCNN())
        state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
        listed = "\n".join(sorted(f"{key} {tuple(value.shape)}" for key, value in state.items()))
        assert len(state) == official["tensors"]
        assert hashlib.sha256(listed.encode()).hexdigest() == official["keys"]
        rng = np.random.default_rng(6)
        regions = [torch.from_numpy(rng.random((2, 256, side, side))).float() for side in (7, 14)]
        with torch.no_grad():
            answers = model(images(), *regions)
        assert answers.keys() == official["outputs"].keys()
        for role, expected in official["outputs"].items():
            scale = max(map(abs, expected))
            np.testing.assert_allclose(sample(answers[role]), expected, rtol=0, atol=1e-4 * scale)

    @pytest.mark.parametrize("index", [0, 1])
    def test_the_whole_finds_the_same_boxes_classes_and_masks(self, opened: Detector, index: int) -> None:
        official, pixels = OFFICIAL["found"][index], picture(index)
        (found,) = opened.submit([frame(pixels)]).result()
        assert len(found) == official["count"]
        rows = np.array(official["rows"])
        np.testing.assert_allclose(found.xyxy[: len(rows)], rows[:, :4], rtol=0, atol=1e-3)
        np.testing.assert_allclose(found.score[: len(rows)], rows[:, 4], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(found.label[: len(rows)], rows[:, 5])
        assert found.mask is not None
        mine = found.mask.pasted(np.arange(len(rows))).numpy()
        for pasted, counts in zip(mine, official["masks"], strict=True):
            theirs = rle.decode(counts.encode(), pixels.shape[:2][::-1])
            different, union = (pasted ^ theirs).sum(), (pasted | theirs).sum()
            assert different <= max(1, 0.001 * union)  # a pixel whose probability is 0.5 may be either

    def test_frames_of_a_batch_do_not_know_each_other(self, opened: Detector) -> None:
        pair = [frame(picture(0)), frame(picture(1))]
        together = opened.submit(pair).result()
        for one, found in zip(pair, together, strict=True):
            (alone,) = opened.submit([one]).result()
            np.testing.assert_allclose(alone.xyxy, found.xyxy, atol=2e-3)
            np.testing.assert_array_equal(alone.label, found.label)

    def test_a_gpu_finds_the_same_in_fixed_shapes(self, opened: Detector, gpu: torch.device) -> None:
        """The kernels, in CUDA graphs, around a network in torch."""
        manifest = MaskRcnn.describe(
            torch_engine(small(), SIZE, 2, torch.device("cpu")), onnx_sha256="0" * 64, names=NAMES
        )
        pair = [frame(picture(0)), frame(picture(1))]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            engine = torch_engine(small().to(gpu), SIZE, 2, gpu)
            frontend = MaskRcnn(engine, manifest, MaskRcnnConfig(conf=0.3, max_batch=2))  # type: ignore[arg-type]
            for _ in range(2):
                found = frontend.submit(pair).result()
            frontend.close()
        assert frontend.problem is None
        for one, there, here in zip(pair, found, opened.submit(pair).result(), strict=True):
            assert there.mask is not None and there.mask.device == gpu
            same = there.label[:, None] == here.label
            same &= boxes.iou(there.xyxy[:, None].astype(float), here.xyxy[None].astype(float)) > 0.99
            same &= np.abs(there.score[:, None] - here.score) < 1e-3
            assert same.any(axis=1).mean() > 0.95 and same.any(axis=0).mean() > 0.95
            assert here.mask is not None
            row, column = np.nonzero(same)
            mine, theirs = there.mask.pasted(row).cpu(), here.mask.pasted(column)
            agree = (mine & theirs).sum(dim=(1, 2)) / (mine | theirs).sum(dim=(1, 2)).clamp(min=1)
            assert agree.median() > 0.99, one.size


def random_boxes(count: int, size: tuple[int, int]) -> Tensor:
    """(1, N, 4) of all sizes within a picture, two that cross it and one without area."""
    torch.manual_seed(3)
    extent = torch.tensor(size)
    low = torch.rand(1, count, 2) * extent
    high = (low + torch.rand(1, count, 2) ** 3 * extent).minimum(extent)
    found = torch.cat((low, high), dim=2)
    found[0, 0] = torch.tensor([0, 20, size[0], 24])
    found[0, 1] = torch.tensor([30, 0, 36, size[1]])
    found[0, 2] = 0
    return found


def onnx_roi_align(features: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """ONNX Runtime's RoiAlign, as mmcv exports its own: half_pixel is aligned=True."""
    node = helper.make_node(
        "RoiAlign", ["x", "rois", "image"], ["y"], output_height=side, output_width=side, sampling_ratio=0,
        spatial_scale=scale, mode="avg", coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    kinds = {"x": TensorProto.FLOAT, "rois": TensorProto.FLOAT, "image": TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    graph = helper.make_graph(
        [node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.zeros(len(rois), np.int64)
    (answer,) = session.run(None, {"x": features.numpy(), "rois": rois.numpy(), "image": image})
    return torch.from_numpy(answer)


class TestRegions:
    @pytest.mark.parametrize("side", [7, 14])
    def test_are_cut_as_onnx_runtime_cuts_them(self, side: int) -> None:
        size = (1280, 960)
        maps = [torch.randn(1, 8, size[1] >> level, size[0] >> level) for level in range(2, 6)]
        found = random_boxes(60, size)
        levels = levels_of(found, len(maps))
        assert set(levels.flatten().tolist()) == {0, 1, 2, 3}
        mine = roi_align(maps, found, levels, side)
        for level, features in enumerate(maps):
            here = levels[0] == level
            theirs = onnx_roi_align(features, found[0, here], side, 1 / (4 << level))
            torch.testing.assert_close(mine[here], theirs, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("place", PLACES)
    def test_are_cut_the_same_by_the_kernel(
        self, request: pytest.FixtureRequest, place: str, dtype: torch.dtype
    ) -> None:
        """Of maps as they come and channels last, into memory of any strides; two images."""
        request.param = place
        run: Run = run_at(request)
        torch.manual_seed(0)
        maps = [torch.randn(2, 5, 24, 32), torch.randn(2, 5, 12, 16)]
        maps[1] = maps[1].contiguous(memory_format=torch.channels_last)
        found = torch.tensor(
            [
                [[3.0, 5, 40, 21], [0, 0, 128, 96], [0, 0, 0, 0]],
                [[8, 2, 128, 8], [-9, 3, 9, 60], [1, 1, 2, 2]],
            ]
        )
        levels = torch.tensor([[0, 1, 0], [0, 0, 1]])
        maps = [features.to(dtype) for features in maps]
        expected = roi_align([features.float() for features in maps], found, levels, 3)
        got = run(cut_by_kernel, maps, found, levels, dtype)
        torch.testing.assert_close(
            got.float(), expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-3
        )

    def test_anchors_lie_around_the_corners_of_places(self) -> None:
        """mmdet: `AnchorGenerator(strides=[4, …], ratios=[0.5, 1, 2], scales=[8])`."""
        every, counts = anchors((64, 32))
        assert counts == [3 * 16 * 8, 3 * 8 * 4, 3 * 4 * 2, 3 * 2 * 1, 3]
        torch.testing.assert_close(every[1], torch.tensor([-16.0, -16, 16, 16]))
        torch.testing.assert_close(every[0], torch.tensor([-22.627417, -11.313708, 22.627417, 11.313708]))
        torch.testing.assert_close(every[4], torch.tensor([-12.0, -16, 20, 16]))  # one place to the right


def cut_by_kernel(maps: list[Tensor], found: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    memory = torch.zeros(6, 3, 3, 8, dtype=dtype, device=found.device)  # as an engine's HWC8 input
    out = memory.permute(0, 3, 1, 2)[:, :5]
    roi_align_kernel(maps, found, levels, 3, out=out)
    return out.contiguous()


class Part:
    """A head that answers what a story says. asked: regions that it was given."""

    device, lanes, description = torch.device("cpu"), 1, "a part"

    def __init__(
        self,
        entry: str,
        side: int,
        outputs: Mapping[str, tuple[int, ...]],
        answer: Callable[[int], Mapping[str, Tensor]],
    ) -> None:
        self.inputs = {entry: (None, 4, side, side)}
        self.outputs = {name: (None, *shape) for name, shape in outputs.items()}
        self._answer = answer
        self.asked: list[Tensor] = []

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (regions,) = inputs.values()
        self.asked.append(regions)
        return dict(self._answer(len(regions)))


class Engine:
    """A trunk that is sure of some anchors, two classes, and the heads of a story."""

    device, lanes, description = torch.device("cpu"), 1, "an engine"
    size = (64, 64)

    def __init__(
        self,
        sure: Sequence[int],
        *,
        logits: Callable[[int], Tensor] | None = None,
        shift: Sequence[float] = (0, 0, 0, 0),
    ) -> None:
        width, height = self.size
        self.anchors, self.counts = anchors(self.size)
        count = len(self.anchors)
        self._answer = {f"p{k}": torch.ones(1, 4, height >> k, width >> k) for k in range(2, 6)}
        self._answer["objectness"] = torch.full((1, count), -200.0)  # a score of 0 in float32
        self._answer["objectness"][0, list(sure)] = torch.linspace(6, 5, len(sure))
        self._answer["shifts"] = torch.tensor(shift).float().repeat(1, count, 1)
        self.inputs = {"images": (1, 3, height, width)}
        self.outputs = {name: tuple(tensor.shape) for name, tensor in self._answer.items()}
        say = logits or (lambda n: torch.tensor([[0.0, 5.0, 0.0]]).repeat(n, 1))
        boxes_part = Part(
            "box_regions", 7, {"logits": (3,), "refinements": (8,)},
            lambda n: {"logits": say(n), "refinements": torch.zeros(n, 8)},
        )  # fmt: skip
        masks_part = Part(
            "mask_regions", 14, {"masks": (2, 28, 28)},
            lambda n: {"masks": torch.tensor([-9.0, 9.0])[None, :, None, None].repeat(n, 1, 28, 28)},
        )  # fmt: skip
        self.parts = {"box_regions": boxes_part, "mask_regions": masks_part}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._answer.items()}

    def break_it(self, name: str) -> None:
        self._answer[name].flatten()[-1] = float("nan")

    def find(self, pixels: NDArray[np.uint8] | None = None, **settings: float) -> Detections:
        manifest = MaskRcnn.describe(self, onnx_sha256="0" * 64, names=("cat", "dog"))
        frontend = MaskRcnn(self, manifest, MaskRcnnConfig(**{"conf": 0.5} | settings))  # type: ignore[arg-type]
        try:
            (found,) = frontend.submit(
                [frame(np.zeros((64, 64, 3), np.uint8) if pixels is None else pixels)]
            ).result()
            return found
        finally:
            frontend.close()

    @property
    def proposals(self) -> int:
        return sum(map(len, self.parts["box_regions"].asked))


MIDDLE = 3 * (16 * 8 + 8) + 1  # the square anchor in the middle at stride 4: 16…48


class TestBetweenTheParts:
    def test_an_object_has_its_anchors_box_and_the_mask_of_its_class(self) -> None:
        found = Engine([MIDDLE]).find()
        np.testing.assert_allclose(found.xyxy, [[16, 16, 48, 48]])
        assert found.label.tolist() == [1] and found.mask is not None
        x, y, pixels = found.mask.crop(0)
        assert pixels.sum() == pytest.approx(32 * 32, abs=140)  # the cells at the rim fade out
        assert (x, y) == (16, 16) or pixels.shape >= (32, 32)

    def test_nothing_proposed_is_nothing_found(self) -> None:
        engine = Engine([], logits=lambda n: torch.tensor([[-9.0, -9.0, 9.0]]).repeat(n, 1))
        found = engine.find()
        assert len(found) == 0 and found.mask is not None and len(found.mask) == 0

    def test_boxes_end_where_the_picture_ends_and_not_where_its_padding_does(self) -> None:
        """64×32 pixels in a 64×64 input; the object's box reaches to 48."""
        found = Engine([MIDDLE]).find(np.zeros((32, 64, 3), np.uint8))
        np.testing.assert_allclose(found.xyxy, [[16, 16, 48, 32]])

    def test_one_level_does_not_silence_another(self) -> None:
        """The same place at stride 4 and, a little larger, at stride 8: both are looked at. Two at one level
        with as much overlap are one.
        """
        counts = Engine([]).counts
        coarse = counts[0] + 3 * (8 * 4 + 4) + 1
        grown = [0.0, 0.0, np.log(1.5), np.log(1.5)]  # both grow: 48 and 96, cut to 64 by the picture
        across = Engine([MIDDLE, coarse], shift=grown)
        across.find()
        assert across.proposals == 2
        beside = Engine([MIDDLE, MIDDLE + 3], shift=grown)
        beside.find()
        assert beside.proposals == 1

    def test_overlapping_objects_are_one_if_of_one_class(self) -> None:
        sure = [MIDDLE, MIDDLE + 6]  # 8 pixels apart: proposals overlap by 0.6
        assert len(Engine(sure).find()) == 1
        different = lambda n: torch.tensor([[0.0, 5.0, 0.0], [5.0, 0.0, 0.0]])[:n]  # noqa: E731
        assert sorted(Engine(sure, logits=different).find().label.tolist()) == [0, 1]

    def test_classes_can_be_chosen(self) -> None:
        assert len(Engine([MIDDLE]).find(classes=("cat",))) == 0  # type: ignore[arg-type]
        assert len(Engine([MIDDLE]).find(classes=("dog",))) == 1  # type: ignore[arg-type]

    def test_at_most_so_many_are_found(self) -> None:
        apart = [3 * (16 * row + column) + 1 for row in (4, 12) for column in (4, 12)]
        engine = Engine(apart)
        assert len(engine.find(nms_iou=1.0)) == 4
        assert len(Engine(apart).find(nms_iou=1.0, objects=2)) == 2
        fewer = Engine(apart)
        fewer.find(proposals=3)
        assert fewer.proposals == 3

    @pytest.mark.parametrize("name", ["objectness", "shifts"])
    def test_what_is_no_number_is_said(self, name: str) -> None:
        engine = Engine([MIDDLE])
        engine.break_it(name)
        with pytest.raises(EngineError, match="NaN or inf"):
            engine.find()

    def test_a_head_that_overflows_is_said(self) -> None:
        with pytest.raises(EngineError, match="NaN or inf"):
            Engine([MIDDLE], logits=lambda n: torch.full((n, 3), float("inf"))).find()

    def test_engines_of_other_networks_are_refused(self) -> None:
        engine = Engine([MIDDLE])
        del engine.parts["mask_regions"]
        with pytest.raises(
            EngineError, match="parts that take box_regions and mask_regions; this one takes images"
        ):
            engine.find()
        with pytest.raises(EngineError, match=r"logits has shape \(3,\) per row.* has \(6,\)"):
            manifest = MaskRcnn.describe(Engine([0]), onnx_sha256="0" * 64, names=NAMES)
            MaskRcnn(Engine([0]), manifest)

    @pytest.mark.parametrize("key", ["proposals", "objects"])
    def test_settings_stay_within_what_engines_are_built_for(self, key: str) -> None:
        with pytest.raises(ConfigError, match=f"{key} is 2000; engines are built for at most"):
            MaskRcnnConfig(**{key: 2000})  # type: ignore[arg-type]


class TestOneFile:
    def test_is_a_graph_of_three_parts_with_batches_of_their_own(self, exported: Path) -> None:
        model = onnx.load(exported)
        batches = {
            value.name: value.type.tensor_type.shape.dim[0].dim_param
            for value in (*model.graph.input, *model.graph.output)
        }
        assert {batches[name] for name in ("images", "p2", "objectness", "shifts")} == {"batch"}
        assert batches["box_regions"] == batches["logits"] == batches["refinements"] != "batch"
        assert batches["mask_regions"] == batches["masks"] != batches["logits"]
        assert not {node.op_type for node in model.graph.node} & {"NonMaxSuppression", "TopK", "RoiAlign"}

    def test_becomes_an_engine_of_three_plans(self, exported: Path, tmp_path: Path) -> None:
        try:
            trt_module("tensorrt_rtx")
        except EngineError as error:
            pytest.skip(str(error))
        path = tmp_path / "x.engine"
        done = build(exported, path, BuildConfig(builder="tensorrt_rtx", batch=(1, 2, 4)))
        assert in_parts(path) and done.manifest.batch == (1, 2, 4)
        plans = unpack(path.read_bytes(), "x")
        assert list(plans) == ["images", "box_regions", "mask_regions"]
        assert all(plan[:4] == b"vtrt" for plan in plans.values())

    def test_is_checked_and_calibrated_with_the_regions_that_its_front_end_cuts(self, exported: Path) -> None:
        manifest = manifests.read(manifests.beside(exported))
        with Feeds.of(onnx.load(exported), manifest) as feeds:
            fed = feeds([frame(picture(0))])
        assert {name: tuple(rows.shape[1:]) for name, rows in fed.items()} == {
            "images": (3, SIZE[1], SIZE[0]), "box_regions": (32, 7, 7), "mask_regions": (32, 14, 14),
        }  # fmt: skip
        assert len(fed["box_regions"]) > len(fed["mask_regions"]) > 1
        assert run_parts(OnnxRuntime(exported, lanes=1), fed)["masks"].shape[1:] == (5, 28, 28)

    def test_plans_are_packed_and_damage_is_seen(self) -> None:
        content = pack({"images": b"abc", "box_regions": b"defg"})
        assert unpack(content, "x") == {"images": b"abc", "box_regions": b"defg"}
        for damaged in (
            content[:-1],
            content[:30],
            b"other " + content,
            content.replace(b'"images"', b'"images}'),
        ):
            with pytest.raises(EngineError, match="x is no engine in parts or is cut short"):
                unpack(damaged, "x")

    @pytest.mark.parametrize("version", ["8.6.1", "10.3.0"])
    def test_each_plan_runs_by_itself(self, tmp_path: Path, version: str) -> None:
        """In a TensorRT that doubles; the heads take other numbers of rows than there are images."""
        regions = (-1, 4, 7, 7)
        plans = {
            "images": plan(tensor("images"), tensor("p2", of="images")),
            "box_regions": plan(
                tensor("box_regions", regions),
                tensor("logits", regions, of="box_regions"),
                profile=(1, 20, 40),
            ),
        }
        path = tmp_path / "x.engine"
        path.write_bytes(pack(plans))
        runtime = PartsRuntime(path, device="cpu", bindings=fake_tensorrt(version))
        assert list(runtime.inputs) == ["images"] and list(runtime.parts) == ["box_regions"]
        assert runtime.max_batch == 4 and "in 2 parts" in runtime.description
        image, many = torch.randn(1, 3, 2, 2), torch.randn(33, 4, 7, 7)
        torch.testing.assert_close(runtime.run({"images": image})["p2"], 2 * image)
        lane = runtime.parts["box_regions"].lane()
        lane.inputs["box_regions"][:33].copy_(many)
        torch.testing.assert_close(lane.enqueue(33)["logits"], 2 * many)

    def test_parts_that_meet_are_refused(self) -> None:
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "abc"]
        graph = helper.make_graph(
            [helper.make_node("Add", ["a", "b"], ["c"], "sum")], "g", ends[:2], ends[2:]
        )
        model = helper.make_model(graph)
        assert list(parts_of(model)) == ["a"]
        helper.set_model_props(model, {"parts": "a, b"})
        with pytest.raises(EngineError, match="the inputs a and b meet in sum"):
            parts_of(model)

    def test_another_engine_is_no_such_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.engine"
        path.write_bytes(b"ftrt and so on")
        assert not in_parts(path)
        with pytest.raises(EngineError, match="no engine in parts"):
            PartsRuntime(path, device="cpu", bindings=object())
