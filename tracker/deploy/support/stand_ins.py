"""Files in the layout of detectors whose weights and exporters are the user's own, around networks of ours.

What runtimes, front ends and INT8 do with such a layout can then be seen without anybody's weights. The
network inside is YOLOX-s or DETR, not the one the layout is named after: speed is only roughly its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from tracker.deploy.detectors import compare
from tracker.deploy.export import Export, inputs_of, write_checked
from tracker.deploy.graph import Lowering, to_onnx
from tracker.frontends import FRONTENDS
from tracker.frontends.layout import cells
from tracker.manifest import Manifest
from tracker.models.zoo import random_detector
from tracker.pixels import to_bgr
from tracker.runtimes.onnx import OnnxRuntime
from tracker.types import Frame

ANCHORS = {"yolov5": 3, "yolov6": 1, "yolov7": 3, "yolov8": 1}
BRIGHTEST = 255.0  # YOLOX's pixels; these layouts' are 0 to 1
LARGEST = 3.0  # logit or logarithm of a side that the network answers: random ones saturate or overflow


@torch.no_grad()
def export_yolo(frontend: str, size: tuple[int, int], out: Path, frames: Sequence[Frame]) -> Export:
    """`out` answers as an export of `frontend` (a key of ANCHORS) in its layout "decoded" does.

    Boxes are decoded in the graph, as those exporters do it. Of three anchors each has the same answer.
    frames: of the input's size.
    Raises as `export_detector`.
    """
    begun = perf_counter()
    model = random_detector("yolox-s", size)
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    stem.weight.mul_(BRIGHTEST)
    _tame(model, _pixels(frames))
    place = cells(size, (8, 16, 32))
    graph = to_onnx(model, _example(size), Lowering(), input_name="images", open_batch=True)
    _append(graph, frontend, place)

    def expected(images: Tensor) -> dict[str, Tensor]:
        rows = model(images)["output"]
        centre = (rows[..., :2] + place[:, :2]) * place[:, 2:]
        extent = rows[..., 2:4].exp() * place[:, 2:]
        if frontend == "yolov8":
            return {"output0": torch.cat((centre, extent, rows[..., 4:5] * rows[..., 5:]), dim=2).mT}
        rows = torch.cat((centre, extent, rows[..., 4:]), dim=2)
        return {"output0": torch.cat([rows] * ANCHORS[frontend], dim=1)}

    return _written(graph, frontend, out, expected, frames, begun)


@torch.no_grad()
def export_rtdetr(size: tuple[int, int], out: Path, frames: Sequence[Frame], **changes: Any) -> Export:
    """`out` answers as an RT-DETR with 80 logits per query does. changes: to DETR's configuration."""
    begun = perf_counter()
    model = random_detector("detr-r50", size, classes=79, **changes)
    graph = to_onnx(model, _example(size), Lowering(), input_name="images", open_batch=True)
    return _written(graph, "rtdetr", out, model, frames, begun)


def _tame(model: nn.Module, images: Tensor) -> None:
    """Scale the layers that answer so that none gives more than LARGEST for these images."""

    def scale(layer: nn.Module, inputs: object, answer: Tensor) -> None:
        for weight in layer.parameters():
            weight.mul_(LARGEST / answer.abs().max())

    hooks = [layer.register_forward_hook(scale) for name, layer in model.named_modules() if "_preds." in name]
    model(images)
    for hook in hooks:
        hook.remove()


def _pixels(frames: Sequence[Frame]) -> Tensor:
    """(B, 3, H, W) in 0…1, of frames of the input's size."""
    pictures = [to_bgr(frame.image) for frame in frames if frame.image is not None]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / BRIGHTEST


def _example(size: tuple[int, int]) -> Tensor:
    return torch.zeros(2, 3, size[1], size[0])


def _written(
    graph: onnx.ModelProto,
    frontend: str,
    out: Path,
    expected: Callable[[Tensor], dict[str, Tensor]],
    frames: Sequence[Frame],
    begun: float,
) -> Export:
    kind = FRONTENDS[frontend]

    def describe(runtime: OnnxRuntime, sha256: str) -> Manifest:
        manifest = kind.describe(runtime, onnx_sha256=sha256)
        kind(runtime, manifest, kind.config_type()).close()
        return manifest

    def check(manifest: Manifest, runtime: OnnxRuntime) -> dict[str, float]:
        images = inputs_of(manifest, 2, frames)
        return compare(expected(images), runtime.run({manifest.input.name: images}))

    return write_checked(graph, out, describe, check, begun=begun)


def _append(model: onnx.ModelProto, frontend: str, place: Tensor) -> None:
    """YOLOX's rows (B, A, 85) decoded and put into the layout."""
    graph = model.graph
    graph.initializer.extend(
        numpy_helper.from_array(values, name)
        for name, values in (
            ("decode.parts", np.array([2, 2, 1, 80], np.int64)),
            ("decode.cell", place[:, :2].numpy()),
            ("decode.stride", place[:, 2:].numpy()),
        )
    )

    def add(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    add("Split", ["output", "decode.parts"], "raw.centre", "raw.extent", "objectness", "classes", axis=2)
    add("Add", ["raw.centre", "decode.cell"], "in_strides")
    add("Mul", ["in_strides", "decode.stride"], "centre")
    add("Exp", ["raw.extent"], "extent_in_strides")
    add("Mul", ["extent_in_strides", "decode.stride"], "extent")
    places = len(place)
    if frontend == "yolov8":
        add("Mul", ["classes", "objectness"], "score")
        add("Concat", ["centre", "extent", "score"], "rows", axis=2)
        add("Transpose", ["rows"], "output0", perm=[0, 2, 1])
        shape: list[str | int | None] = ["batch", 84, places]
    else:
        anchors = ANCHORS[frontend]
        rows = "rows" if anchors > 1 else "output0"
        add("Concat", ["centre", "extent", "objectness", "classes"], rows, axis=2)
        if anchors > 1:
            add("Concat", [rows] * anchors, "output0", axis=1)
        shape = ["batch", anchors * places, 85]
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("output0", onnx.TensorProto.FLOAT, shape))
    onnx.checker.check_model(model, full_check=True)
