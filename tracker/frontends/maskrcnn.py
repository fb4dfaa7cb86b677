"""Mask R-CNN with a feature pyramid: boxes with an instance mask each.

He et al., "Mask R-CNN" (ICCV 2017), as mmdet runs it (`mmdet/models/dense_heads/rpn_head.py`,
`roi_heads/standard_roi_head.py`, `configs/_base_/models/mask-rcnn_r50_fpn.py`). Its engine has three parts;
what lies between them happens here, on the device, because it does not fit into one:

    images → trunk → feature maps, objectness and shifts of 250 000 anchors
             the 1000 best of each level, NMS within each level, the 1000 best of all; RoIAlign 7×7
           → box head → classes and refined boxes
             NMS within each class, the 100 best; RoIAlign 14×14
           → mask head → 28×28 logits, which stay on the device

TensorRT takes no top-K above 3840 and no NMS of more than 5000 boxes, TensorRT-RTX no RoIAlign and no NMS at
all; mmdet's own export gives up the levels in the first NMS. Nothing is lost by the seam: the parts run in
one CUDA graph with what lies between, in fixed shapes. On a host rows without an object are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from tracker.boxes import Fit
from tracker.errors import ConfigError, EngineError
from tracker.frontends.coco import COCO_NAMES
from tracker.frontends.detector import (
    Detector,
    DetectorConfig,
    check_count,
    check_finite,
    check_share,
    mmdet_input,
    not_finite,
)
from tracker.frontends.lanes import Answer, DeviceLane, HostLane, Lane, Outputs, Packed
from tracker.frontends.nms import nms
from tracker.frontends.regions import STRIDES, anchors, levels_of, refined, roi_align
from tracker.kernels import nms as kernels
from tracker.kernels.best import MAX_LIMIT
from tracker.kernels.roi_align import roi_align as roi_align_kernel
from tracker.manifest import Manifest, Precision
from tracker.masks import MaskCrops
from tracker.types import Detections, EngineLane, LaneRuntime, Runtime

MAPS = ("p2", "p3", "p4", "p5")
TRUNK = (*MAPS, "objectness", "shifts")
BOXES, MASKS = "box_regions", "mask_regions"  # inputs of the heads
SIDES = {BOXES: 7, MASKS: 14}
PER_LEVEL = 1000  # proposals of one level before NMS
RPN_IOU, CLASS_IOU = 0.7, 0.5
SHIFTS, REFINEMENTS = (1.0, 1.0), (0.1, 0.2)  # mmdet's `target_stds`, of centre and size


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRcnnConfig(DetectorConfig):
    """conf is the least score; the official one, for evaluation, is 0.05.

    proposals: regions per frame that are looked at. objects: found per frame at most. nms_iou: overlap above
    which the weaker of two boxes of a class is dropped. mask_threshold: probability from which a pixel is in
    the mask.
    """

    proposals: int = 1000
    objects: int = 100
    nms_iou: float = CLASS_IOU
    mask_threshold: float = 0.5

    def __post_init__(self) -> None:
        DetectorConfig.__post_init__(self)
        check_share("nms_iou", self.nms_iou)
        check_share("mask_threshold", self.mask_threshold)
        for key, most in zip(("proposals", "objects"), MaskRcnn.parts.values(), strict=True):
            check_count(key, getattr(self, key))
            if getattr(self, key) > most:
                raise ConfigError(f"{key} is {getattr(self, key)}; engines are built for at most {most}")


class MaskRcnn(Detector):
    """Raises EngineError for an engine that does not fit, ConfigError for a manifest with other roles and for
    unknown classes.
    """

    masks = True
    config_type = MaskRcnnConfig
    parts: ClassVar[Mapping[str, int]] = {BOXES: 1000, MASKS: 100}

    def __init__(self, runtime: Runtime, manifest: Manifest, config: MaskRcnnConfig | None = None) -> None:
        self._config = config or MaskRcnnConfig()
        if manifest.outputs.keys() != set(TRUNK):
            raise ConfigError(
                f"Mask R-CNN outputs are {', '.join(TRUNK)}; the manifest has {', '.join(manifest.outputs)}: "
                "export the network again"
            )
        self._parts = _parts_of(runtime)
        super().__init__(runtime, manifest, self._config)
        size = manifest.input.size
        if size[0] % 32 or size[1] % 32:
            raise EngineError(f"input size is {size[0]}×{size[1]}; Mask R-CNN needs multiples of 32")
        self._size = size
        self._anchors, self._levels = anchors(size)
        self._start()

    @classmethod
    def describe(
        cls,
        runtime: Runtime,
        *,
        onnx_sha256: str,
        names: tuple[str, ...] = COCO_NAMES,
        size: tuple[int, int] | None = None,
        precision: Precision = "fp32",
    ) -> Manifest:
        """The manifest of an ONNX file as `tools/export.py` writes it; nobody else's has these parts.

        Raises EngineError for any other.
        """
        _parts_of(runtime)
        if not set(TRUNK) <= runtime.outputs.keys():
            raise EngineError(
                f"Mask R-CNN has outputs {', '.join(TRUNK)}; the engine gives {', '.join(runtime.outputs)}: "
                "export it with tools/export.py"
            )
        return Manifest(
            frontend="maskrcnn",
            input=mmdet_input(runtime, size),
            outputs={role: role for role in TRUNK},
            names=names,
            precision=precision,
            onnx_sha256=onnx_sha256,
            engine_sha256=onnx_sha256,
        )

    def _check(self, outputs: Outputs) -> None:
        (width, height), classes = self._size, len(self.names)
        channels = outputs["p2"].shape[1]
        for name, stride in zip(MAPS, STRIDES, strict=False):
            _check_shape(name, outputs[name].shape[1:], (channels, height // stride, width // stride))
        _check_shape("objectness", outputs["objectness"].shape[1:], (len(self._anchors),))
        _check_shape("shifts", outputs["shifts"].shape[1:], (len(self._anchors), 4))
        boxes, masks = (self._parts[name] for name in (BOXES, MASKS))
        for part, name, wanted in (
            (boxes, "logits", (classes + 1,)),
            (boxes, "refinements", (4 * classes,)),
            (masks, "masks", (classes, 28, 28)),
        ):
            _check_shape(name, part.outputs.get(name, (0,))[1:], wanted)
        for name, part in self._parts.items():
            _check_shape(name, part.inputs[name][1:], (channels, SIDES[name], SIDES[name]))
        check_finite(*outputs.values())
        if self._on_device():
            self._anchors, self._wanted = self._anchors.to(self.device), self._wanted.to(self.device)

    def _lane(self) -> Lane:
        if self._on_device():
            assert isinstance(self._runtime, LaneRuntime)
            heads: _Heads = _DeviceHeads({name: _lanes(part) for name, part in self._parts.items()})
            lane: Lane = DeviceLane(
                self._runtime.lane(), self.device, self._manifest, self.max_batch,
                lambda outputs: self._find(outputs, lane.placed, heads),
            )  # fmt: skip
            return lane
        heads = _HostHeads(self._parts)
        lane = HostLane(
            self._runtime, self._manifest, self.max_batch,
            lambda outputs: self._find(_on_host(outputs), lane.placed, heads),
        )  # fmt: skip
        return lane

    def _pack(self, outputs: Outputs) -> Answer:
        raise AssertionError("lanes have heads of their own: see `_lane`")

    def _find(self, outputs: Outputs, placed: Tensor, heads: _Heads) -> Answer:
        """(B, K, 6) box in input pixels, score and label by falling score, then rows of score 0; and the
        logits (B, K, 28, 28) of their masks.

        placed: see `Lane.placed`. NaN or inf in what the engine answers is NaN in the first row's score.
        """
        maps = [outputs[name] for name in MAPS]
        batch = len(maps[0])
        low = placed[:batch, :2].float()
        bounds = low, low + placed[:batch, 2:].float()
        rows = heads.trimmed(self._proposals(outputs, bounds, heads))
        regions, present = rows[..., :4], rows[..., 4] > 0
        found = heads(BOXES, maps, regions)
        answers = [outputs["objectness"], outputs["shifts"], *found.values()]
        classes = self._classified(found, regions, present, bounds)
        rows = heads.trimmed(heads.suppressed(classes, self._config.nms_iou)[:, : self._config.objects])
        found = heads(MASKS, maps, rows[..., :4])
        label = rows[..., 5].long().flatten()
        masks = found["masks"][torch.arange(len(label), device=label.device), label].float()
        masks = masks.reshape(*rows.shape[:2], *masks.shape[1:])
        for answer in (*answers, masks):
            broken = (answer.reshape(batch, -1).float() * 0).sum(dim=1)  # NaN for NaN and inf, else 0
            rows[:, 0, 4] += broken
        return Answer(rows, masks)

    def _proposals(self, outputs: Outputs, bounds: tuple[Tensor, Tensor], heads: _Heads) -> Tensor:
        """(B, P, 6) box, objectness and 0, the best first, then rows of score 0.

        Suppression is by level, each an image of its own: what offsets in official code are for.
        """
        levels, first = [], 0
        for count in self._levels:
            last = first + count
            score, place = outputs["objectness"][:, first:last].float().sigmoid().topk(min(PER_LEVEL, count))
            shift = outputs["shifts"][:, first:last].gather(1, place[..., None].expand(-1, -1, 4)).float()
            box = _inside(refined(self._anchors[first:last][place], shift, SHIFTS), bounds)
            score = score * (box[..., 2:] > box[..., :2]).all(dim=2)
            rows = torch.cat((box, score[..., None], torch.zeros_like(score)[..., None]), dim=2)
            levels.append(torch.nn.functional.pad(rows, (0, 0, 0, PER_LEVEL - rows.shape[1])))
            first = last
        rows = heads.suppressed(torch.stack(levels, dim=1).flatten(0, 1), RPN_IOU)
        rows = rows.reshape(-1, len(levels) * rows.shape[1], 6)
        best: Tensor = rows[..., 4].topk(min(self._config.proposals, rows.shape[1])).indices
        return rows.gather(1, best[..., None].expand(-1, -1, 6))

    def _classified(
        self, found: Mapping[str, Tensor], regions: Tensor, present: Tensor, bounds: tuple[Tensor, Tensor]
    ) -> Tensor:
        """(B, P·C, 6) box, score and label of every class of every region; score 0 where that is nothing."""
        (batch, count), classes = present.shape, len(self.names)
        score = found["logits"].float().softmax(dim=1)[:, :-1].reshape(batch, count, classes)
        shifts = found["refinements"].float().reshape(batch, count, classes, 4)
        box = _inside(refined(regions[:, :, None], shifts, REFINEMENTS).flatten(1, 2), bounds)
        counts = present[..., None] & self._wanted & (score >= self._config.conf)
        score = torch.where(counts, score, 0.0).flatten(1)
        label = torch.arange(classes, device=box.device).float().repeat(batch, count)
        return torch.cat((box, score[..., None], label[..., None]), dim=2)

    def _unpack(self, packed: Packed, fits: Sequence[Fit], kept: Tensor | None) -> list[Detections]:
        assert kept is not None
        if not np.isfinite(packed[..., 4].sum()):
            raise not_finite()
        found = []
        for rows, fit, logits in zip(packed, fits, kept, strict=False):
            rows = rows[rows[:, 4] > 0]
            xyxy = fit.to_source(rows[:, :4]).astype(np.float32)
            masks = MaskCrops(
                logits[: len(rows)], torch.from_numpy(xyxy), fit.source_size, self._config.mask_threshold
            )
            found.append(
                Detections(xyxy=xyxy, score=rows[:, 4].copy(), label=rows[:, 5].astype(np.int64), mask=masks)
            )
        return found


class _Heads(Protocol):
    """What lies between the parts and depends on where they run."""

    def __call__(self, name: str, maps: Sequence[Tensor], boxes: Tensor) -> Mapping[str, Tensor]:
        """What a head answers, by output, to the regions of boxes (B, K, 4): (B·K, …) each."""
        ...

    def suppressed(self, rows: Tensor, iou_threshold: float) -> Tensor:
        """Of rows (B, N, 6), those that suppression keeps, the best first, then rows of zeros."""
        ...

    def trimmed(self, rows: Tensor) -> Tensor:
        """Rows (B, K, 6) with fewer of those that no image needs."""
        ...


class _DeviceHeads:
    """Engines' lanes on a GPU, in fixed shapes and without waiting."""

    def __init__(self, lanes: Mapping[str, EngineLane]) -> None:
        self._lanes = lanes

    def __call__(self, name: str, maps: Sequence[Tensor], boxes: Tensor) -> Mapping[str, Tensor]:
        count = boxes.shape[0] * boxes.shape[1]
        regions = self._lanes[name].inputs[name][:count]
        roi_align_kernel(maps, boxes, levels_of(boxes, len(maps)), SIDES[name], out=regions)
        return self._lanes[name].enqueue(count)

    def suppressed(self, rows: Tensor, iou_threshold: float) -> Tensor:
        return kernels.nms(rows, iou_threshold=iou_threshold, limit=min(MAX_LIMIT, rows.shape[1]))

    def trimmed(self, rows: Tensor) -> Tensor:
        return rows


class _HostHeads:
    """Runtimes in the host's memory, which take as many rows as there are."""

    def __init__(self, parts: Mapping[str, Runtime]) -> None:
        self._parts = parts

    def __call__(self, name: str, maps: Sequence[Tensor], boxes: Tensor) -> Mapping[str, Tensor]:
        regions = roi_align(maps, boxes, levels_of(boxes, len(maps)), SIDES[name])
        return _on_host(self._parts[name].run({name: regions}))

    def suppressed(self, rows: Tensor, iou_threshold: float) -> Tensor:
        image, place = (rows[..., 4] > 0).nonzero(as_tuple=True)
        likely = rows[image, place]
        group = image * (int(rows[..., 5].max()) + 1) + likely[:, 5].long()
        strong = nms(likely[:, :4], likely[:, 4], group, iou_threshold=iou_threshold)
        image, likely = image[strong], likely[strong]
        kept = [likely[image == index] for index in range(len(rows))]
        packed = rows.new_zeros(len(rows), max(1, *map(len, kept)), 6)
        for there, found in zip(packed, kept, strict=True):
            there[: len(found)] = found
        return packed

    def trimmed(self, rows: Tensor) -> Tensor:
        most = int((rows[..., 4] > 0).sum(dim=1).max())
        return rows[:, : max(most, 1)]


def _inside(boxes: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """Boxes (B, N, 4) within what the images (B, 2), (B, 2) fill of their inputs."""
    low, high = (bound.repeat(1, 2)[:, None] for bound in bounds)
    return boxes.maximum(low).minimum(high)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _lanes(part: Runtime) -> EngineLane:
    assert isinstance(part, LaneRuntime)
    return part.lane()


def _parts_of(runtime: Runtime) -> Mapping[str, Runtime]:
    """The heads; EngineError unless the engine has just these."""
    parts: Mapping[str, Runtime] = getattr(runtime, "parts", {})
    if parts.keys() != MaskRcnn.parts.keys():
        raise EngineError(
            f"a Mask R-CNN engine has parts that take {' and '.join(MaskRcnn.parts)}; this one takes "
            f"{', '.join((*runtime.inputs, *parts))}: export the network with tools/export.py"
        )
    return parts


def _check_shape(name: str, have: tuple[int | None, ...], wanted: tuple[int, ...]) -> None:
    if tuple(have) != wanted:
        raise EngineError(
            f"{name} has shape {tuple(have)} per row; Mask R-CNN with this input and these class names has "
            f"{wanted}: correct the names, or export the network again"
        )
