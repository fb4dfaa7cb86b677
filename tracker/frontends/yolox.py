"""YOLOX: frames in, objects out.

Knows the official network's output rows (github.com/Megvii-BaseDetection/YOLOX, `yolox/models/yolo_head.py`);
how an engine wants its pixels, its manifest says, and who runs it does not matter here.

An engine has one output of rows [B, A, 5 + C]: box, objectness, C class scores, the last two already
sigmoid. A is one row per cell of the grids at strides 8, 16 and 32. The manifest names the tensor by what
the boxes are:

    "undecoded"   offsets to the cell in strides and log sizes: what the official exporter writes
    "decoded"     centre and size in input pixels: what it writes with --decode_in_inference
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

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
    input_of,
    not_finite,
)
from tracker.frontends.lanes import Outputs, Packed
from tracker.frontends.nms import nms, strongest
from tracker.kernels.nms import decode_yolox
from tracker.manifest import IMAGENET_MEAN, IMAGENET_STD, Input, Manifest, Precision
from tracker.types import Detections, Runtime

STRIDES = (8, 16, 32)
Layout = Literal["undecoded", "decoded"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class YoloxConfig(DetectorConfig):
    """conf is the least objectness × best class score.

    nms_iou: overlap above which the weaker of two boxes of a class is dropped. 0.7 is what the official
        ByteTrack tracks with (its `tools/track.py`); people in crowds overlap more than YOLOX's 0.45.
    max_candidates: per frame, the strongest before NMS. TensorRT's own top-K takes no more.
    """

    nms_iou: float = 0.7
    max_candidates: int = 3840

    def __post_init__(self) -> None:
        DetectorConfig.__post_init__(self)
        check_share("nms_iou", self.nms_iou)
        check_count("max_candidates", self.max_candidates)


class Yolox(Detector):
    """The front end. Raises EngineError for an engine that does not fit, ConfigError for unknown classes."""

    config_type = YoloxConfig
    layouts = LAYOUTS

    def __init__(self, runtime: Runtime, manifest: Manifest, config: YoloxConfig | None = None) -> None:
        self._config = config or YoloxConfig()
        self._role: Layout = _layout(manifest)
        self._size = manifest.input.size
        self._cells = _cells(self._size)  # (A, 3)
        super().__init__(runtime, manifest, self._config)
        self._start()

    @staticmethod
    def describe(
        runtime: Runtime,
        *,
        onnx_sha256: str,
        names: tuple[str, ...] = COCO_NAMES,
        layout: str = "undecoded",
        size: tuple[int, int] | None = None,
        precision: Precision = "fp32",
        legacy: bool = False,
    ) -> Manifest:
        """The manifest of an ONNX file as the official exporter writes it.

        size: (width, height), needed where the file leaves it open. legacy: RGB with ImageNet's mean and
        standard deviation, as YOLOX's first models and ByteTrack's were trained
        (`yolox/data/data_augment.py:ValTransform`); later ones take BGR from 0 to 255.
        """
        if len(runtime.inputs) != 1 or len(runtime.outputs) != 1:
            raise EngineError(
                f"a YOLOX engine has one input and one output; this one takes {', '.join(runtime.inputs)} "
                f"and gives {', '.join(runtime.outputs)}: for one that suppresses by itself name "
                "yolox-end2end"
            )
        (name, size), (output,) = input_of(runtime, size), runtime.outputs
        return Manifest(
            frontend="yolox",
            input=Input(
                name=name,
                size=size,
                layout="NCHW",
                colour="rgb" if legacy else "bgr",
                mean=IMAGENET_MEAN if legacy else (0.0, 0.0, 0.0),
                std=IMAGENET_STD if legacy else (1.0, 1.0, 1.0),
                resize="corner",
                pad=114.0,
            ),
            outputs={layout: output},
            names=names,
            precision=precision,
            onnx_sha256=onnx_sha256,
            engine_sha256=onnx_sha256,
        )

    def _pack(self, outputs: Outputs) -> Tensor:
        if outputs[self._role].is_cuda:
            return decode_yolox(
                outputs[self._role],
                self._cells,
                self._wanted,
                layout=self._role,
                conf=self._config.conf,
                iou_threshold=self._config.nms_iou,
                limit=self._config.max_candidates,
            )
        return self._decode(outputs)

    def _decode(self, outputs: Outputs) -> Tensor:
        """(N, 7): corners in input pixels, score, label and image, from rows (B, A, 5 + C).

        Few, small operations: each costs more for being called than for what it does.
        """
        rows = outputs[self._role]
        conf, limit = self._config.conf, self._config.max_candidates
        objectness = rows[..., 4]
        image, cell = (objectness >= conf).nonzero(as_tuple=True)  # class scores are at most 1
        found = rows[image, cell].float()  # (K, 5 + C); in FP16, boxes would jump by pixels
        check_finite(objectness, found)
        best, label = found[:, 5:].max(dim=1)
        score = found[:, 4] * best
        about = torch.stack((score, label, image), dim=1)
        chosen = (score >= conf) & self._wanted[label]
        found = torch.cat((found[:, :4], self._cells[cell], about), dim=1)[chosen]  # (K, 4 + 3 + 3)
        if len(found) > limit:
            found = found[strongest(found[:, 7], found[:, 9].long(), limit)]
        box, place, about = torch.split(found, [4, 3, 3], dim=1)
        score, label, image = about.unbind(dim=1)
        xyxy = self._boxes(box, place)
        keep = nms(xyxy, score, image * len(self.names) + label, iou_threshold=self._config.nms_iou)
        return torch.cat((xyxy, about), dim=1)[keep]

    def _unpack(self, packed: Packed, fits: Sequence[Fit], kept: Tensor | None) -> list[Detections]:
        if packed.ndim == 2:  # rows of all images, as many as there are
            return [_detections(packed[packed[:, 6] == index], fit) for index, fit in enumerate(fits)]
        if not np.isfinite(packed[..., 4].sum()):
            raise not_finite()
        return [_detections(rows[rows[:, 4] > 0], fit) for rows, fit in zip(packed, fits, strict=True)]

    def _boxes(self, box: Tensor, cell: Tensor) -> Tensor:
        """(K, 4) corners in input pixels from rows' boxes (K, 4) and cells' column, row, stride (K, 3)."""
        if self._role == "decoded":
            centre, half = box[:, :2], box[:, 2:] / 2
        else:
            stride = cell[:, 2:]
            centre, half = (box[:, :2] + cell[:, :2]) * stride, box[:, 2:].exp() * (stride / 2)
        return torch.cat((centre - half, centre + half), dim=1)

    def _check(self, outputs: Outputs) -> None:
        rows, (width, height) = outputs[self._role], self._size
        cells, classes = len(self._cells), len(self.names)
        if rows.shape != (1, cells, 5 + classes):
            raise EngineError(
                f"output {self._roles[self._role]} has shape {tuple(rows.shape)}; YOLOX with a "
                f"{width}×{height} input and {classes} class names gives (1, {cells}, {5 + classes}): "
                "correct the size or the names, or name another front end"
            )
        check_finite(rows)
        self._cells, self._wanted = self._cells.to(rows.device), self._wanted.to(rows.device)
        self._check_layout(rows[0, :, :2].float())

    def _check_layout(self, centre: Tensor) -> None:
        """EngineError if centres (A, 2) make sense only in the layout that was not declared.

        YOLOX is trained on centres within 1.5 strides of their cell, 2.5 in its first release
        (`center_radius`), and on an empty image stays there too (median 0.6); read in the wrong layout they
        lie off by a good part of the grid.
        """
        far = 2.5
        undecoded = float(centre.abs().median())
        decoded = float((centre / self._cells[:, 2:] - self._cells[:, :2]).abs().median())
        declared, other = (undecoded, decoded) if self._role == "undecoded" else (decoded, undecoded)
        if declared > far > other:
            right = next(layout for layout in LAYOUTS if layout != self._role)
            raise EngineError(
                f"output {self._roles[self._role]} is declared {self._role}, but then its boxes lie "
                f"{declared:.0f} cells from where they belong; read as {right}, {other:.1f}: "
                f"declare it {right}"
            )


def _layout(manifest: Manifest) -> Layout:
    """The role of the one output."""
    roles = tuple(manifest.outputs)
    layouts = [layout for layout in LAYOUTS if layout in roles]
    if len(roles) != 1 or not layouts:
        raise ConfigError(
            f"YOLOX outputs are {' or '.join(LAYOUTS)}, exactly one; the manifest has {', '.join(roles)}"
        )
    return layouts[0]


def _cells(size: tuple[int, int]) -> Tensor:
    """(A, 3) column, row and stride of every cell, in the order of the network's rows."""
    if size[0] % STRIDES[-1] or size[1] % STRIDES[-1]:
        raise EngineError(f"input size is {size[0]}×{size[1]}; YOLOX needs multiples of {STRIDES[-1]}")
    levels = []
    for stride in STRIDES:
        row_column = torch.cartesian_prod(torch.arange(size[1] // stride), torch.arange(size[0] // stride))
        levels.append(torch.cat((row_column.flip(1), torch.full((len(row_column), 1), stride)), dim=1))
    return torch.cat(levels).float()


def _detections(packed: np.ndarray, fit: Fit) -> Detections:
    """Rows (N, 7) of one image, boxes in input pixels. Boxes may reach beyond the image, as objects do:
    clipping would shift the centre and shape that the tracker follows.
    """
    return Detections(
        xyxy=fit.to_source(packed[:, :4]).astype(np.float32),
        score=packed[:, 4].copy(),
        label=packed[:, 5].astype(np.int64),
    )
