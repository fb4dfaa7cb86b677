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

import difflib
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from tracker.boxes import Fit
from tracker.errors import ConfigError, EngineError
from tracker.frontends.coco import COCO_NAMES
from tracker.frontends.nms import nms, strongest
from tracker.frontends.preprocess import Preprocessor, batch_of
from tracker.frontends.worker import single_worker
from tracker.manifest import Input, Manifest, Precision
from tracker.types import Detections, Frame, Runtime

STRIDES = (8, 16, 32)
LAYOUTS = ("undecoded", "decoded")


@dataclass(frozen=True, slots=True, kw_only=True)
class YoloxConfig:
    """What counts as an object.

    conf: least objectness × best class score. 0.1 is where ByteTrack's second pass ends (its
        `byte_tracker.py`), so a lower one changes no track.
    nms_iou: overlap above which the weaker of two boxes of a class is dropped. 0.7 is what the official
        ByteTrack tracks with (its `tools/track.py`); people in crowds overlap more than YOLOX's 0.45.
    max_candidates: per frame, the strongest before NMS. TensorRT's own top-K takes no more.
    classes: names of the classes to keep; empty keeps all.
    max_batch: frames at once for an engine whose batch is open; others say themselves.
    """

    conf: float = 0.1
    nms_iou: float = 0.7
    max_candidates: int = 3840
    classes: tuple[str, ...] = ()
    max_batch: int = 8

    def __post_init__(self) -> None:
        for key in ("conf", "nms_iou"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be above 0 and at most 1")
        for key in ("max_candidates", "max_batch"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1")


class Yolox:
    """The front end. One worker thread prepares, runs and decodes, so that the caller's thread can decode
    video and associate meanwhile.

    Runs the engine once on an empty image, so that an engine that does not fit is found before the first
    frame. Raises EngineError for that, ConfigError for unknown classes.

    seconds: spent so far in each stage: preprocess, inference, postprocess.
    """

    embeds = False

    def __init__(self, runtime: Runtime, manifest: Manifest, config: YoloxConfig | None = None) -> None:
        self._config = config or YoloxConfig()
        self._runtime = runtime
        self._input = manifest.input.name
        self._role, self._output = _output(runtime, manifest)
        self.names = manifest.names
        self._wanted = _wanted(self._config.classes, self.names)  # (C,)
        self._cells = _cells(manifest.input.size)  # (A, 3)
        batch = batch_of(runtime, manifest.input)
        self._static = batch is not None
        self.max_batch = batch or self._config.max_batch
        self._preprocess = Preprocessor(manifest.input, self.max_batch)
        self.seconds = {"preprocess": 0.0, "inference": 0.0, "postprocess": 0.0}
        self._worker = single_worker()
        try:
            self._worker.submit(self._probe).result()
        except BaseException:
            self.close()
            raise

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
                f"and gives {', '.join(runtime.outputs)}"
            )
        (name, shape), (output,) = *runtime.inputs.items(), runtime.outputs
        if size is None:
            if len(shape) != 4 or shape[2] is None or shape[3] is None:
                raise EngineError(f"input {name} has shape {shape}: say its image size with --input-size WxH")
            size = (shape[3], shape[2])
        return Manifest(
            frontend="yolox",
            input=Input(
                name=name,
                size=size,
                layout="NCHW",
                colour="rgb" if legacy else "bgr",
                mean=(123.675, 116.28, 103.53) if legacy else (0.0, 0.0, 0.0),
                std=(58.395, 57.12, 57.375) if legacy else (1.0, 1.0, 1.0),
                resize="corner",
                pad=114.0,
            ),
            outputs={layout: output},
            names=names,
            precision=precision,
            onnx_sha256=onnx_sha256,
            engine_sha256=onnx_sha256,
        )

    def submit(self, frames: Sequence[Frame]) -> Future[list[Detections]]:
        """Start on 1 to max_batch frames, of any sizes. Errors of the work are raised by its `result`."""
        if not 1 <= len(frames) <= self.max_batch:
            raise EngineError(
                f"{len(frames)} frames submitted; this engine takes 1 to {self.max_batch} at once"
            )
        return self._worker.submit(self._detect, frames)

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _detect(self, frames: Sequence[Frame]) -> list[Detections]:
        begun = perf_counter()
        tensor, fits = self._preprocess(frames)
        prepared = perf_counter()
        rows = self._run(tensor, len(frames))
        ran = perf_counter()
        detections = self._decode(rows, fits)
        self.seconds["preprocess"] += prepared - begun
        self.seconds["inference"] += ran - prepared
        self.seconds["postprocess"] += perf_counter() - ran
        return detections

    def _run(self, tensor: Tensor, count: int) -> Tensor:
        """(count, A, 5 + C) rows of the first `count` images."""
        tensor = tensor if self._static else tensor[:count]
        return self._runtime.run({self._input: tensor})[self._output][:count]

    @torch.inference_mode()
    def _decode(self, rows: Tensor, fits: Sequence[Fit]) -> list[Detections]:
        """Objects of each image from rows (B, A, 5 + C), on their device up to the one copy to the host.

        Few, small operations: each costs more for being called than for what it does.
        """
        conf, limit = self._config.conf, self._config.max_candidates
        objectness = rows[..., 4]
        image, cell = (objectness >= conf).nonzero(as_tuple=True)  # class scores are at most 1
        found = rows[image, cell].float()  # (K, 5 + C); in FP16, boxes would jump by pixels
        _check_finite(objectness, found)
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
        packed = torch.cat((xyxy, about), dim=1)[keep].cpu().numpy()  # (N, 4 + 3)
        return [_detections(packed[packed[:, 6] == index], fit) for index, fit in enumerate(fits)]

    def _boxes(self, box: Tensor, cell: Tensor) -> Tensor:
        """(K, 4) corners in input pixels from rows' boxes (K, 4) and cells' column, row, stride (K, 3)."""
        if self._role == "decoded":
            centre, half = box[:, :2], box[:, 2:] / 2
        else:
            stride = cell[:, 2:]
            centre, half = (box[:, :2] + cell[:, :2]) * stride, box[:, 2:].exp() * (stride / 2)
        return torch.cat((centre - half, centre + half), dim=1)

    def _probe(self) -> None:
        """Run once on an empty image; EngineError unless the rows are what the manifest promises."""
        tensor, _ = self._preprocess(())
        rows = self._run(tensor, 1)
        cells, classes = len(self._cells), len(self.names)
        if rows.shape != (1, cells, 5 + classes):
            width, height = tensor.shape[3], tensor.shape[2]
            raise EngineError(
                f"output {self._output} has shape {tuple(rows.shape)}; YOLOX with a {width}×{height} input "
                f"and {classes} class names gives (1, {cells}, {5 + classes}): correct the size or "
                "the names, or name another front end"
            )
        _check_finite(rows)
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
                f"output {self._output} is declared {self._role}, but then its boxes lie {declared:.0f} "
                f"cells from where they belong; read as {right}, {other:.1f}: declare it {right}"
            )


def _output(runtime: Runtime, manifest: Manifest) -> tuple[str, str]:
    """Role and tensor name of the one output, both known to exist."""
    roles = tuple(manifest.outputs)
    if len(roles) != 1 or roles[0] not in LAYOUTS:
        raise ConfigError(
            f"YOLOX outputs are {' or '.join(LAYOUTS)}, exactly one; the manifest has {', '.join(roles)}"
        )
    name = manifest.outputs[roles[0]]
    if name not in runtime.outputs:
        raise EngineError(
            f"the engine has no output {name}, only {', '.join(runtime.outputs)}: correct the manifest"
        )
    return roles[0], name


def _wanted(classes: Sequence[str], names: Sequence[str]) -> Tensor:
    """(C,) which classes to keep."""
    for name in classes:
        if name not in names:
            near = difflib.get_close_matches(name, names) or names[:5]
            raise ConfigError(
                f"no class {name!r} among the engine's {len(names)}; near it: {', '.join(near)}"
            )
    return torch.tensor([not classes or name in classes for name in names])


def _cells(size: tuple[int, int]) -> Tensor:
    """(A, 3) column, row and stride of every cell, in the order of the network's rows."""
    if size[0] % STRIDES[-1] or size[1] % STRIDES[-1]:
        raise EngineError(f"input size is {size[0]}×{size[1]}; YOLOX needs multiples of {STRIDES[-1]}")
    levels = []
    for stride in STRIDES:
        row_column = torch.cartesian_prod(torch.arange(size[1] // stride), torch.arange(size[0] // stride))
        levels.append(torch.cat((row_column.flip(1), torch.full((len(row_column), 1), stride)), dim=1))
    return torch.cat(levels).float()


def _check_finite(*tensors: Tensor) -> None:
    # A sum sees every NaN and inf; it can overflow without one, so only then is each value looked at.
    total = sum(float(tensor.sum(dtype=torch.float32)) for tensor in tensors)
    if not math.isfinite(total) and not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise EngineError(
            "the engine answers NaN or inf: it overflows at its precision (try FP32), or its manifest "
            "describes another input than it was trained on"
        )


def _detections(packed: np.ndarray, fit: Fit) -> Detections:
    """Rows (N, 7) of one image, boxes in input pixels. Boxes may reach beyond the image, as objects do:
    clipping would shift the centre and shape that the tracker follows.
    """
    return Detections(
        xyxy=fit.to_source(packed[:, :4]).astype(np.float32),
        score=packed[:, 4].copy(),
        label=packed[:, 5].astype(np.int64),
    )
