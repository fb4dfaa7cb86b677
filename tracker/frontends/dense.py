"""Detectors that say of many places whether an object is there: any that a `Spec` describes.

Runs the spec: which places are candidates, their boxes, the strongest among overlapping ones. On the host
only candidates are decoded; on a GPU every place is, in fixed shapes, because a wait would cost more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tracker.boxes import Fit, long_side_first, scaled, unturned
from tracker.errors import ConfigError, EngineError
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
from tracker.frontends.layout import Layout, Raw, Spec, could_be, dimensions, grid_of
from tracker.frontends.nms import nms, rotated_nms, strongest
from tracker.kernels import nms as kernels
from tracker.manifest import Input, Manifest, Precision
from tracker.types import Detections, Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig(DetectorConfig):
    """conf is the least score.

    nms_iou: overlap above which the weaker of two boxes of a class is dropped; None is the detector's own.
    max_candidates: per frame, the strongest before NMS. TensorRT's own top-K takes no more.
    multi_label: every class above conf is an object of its own, as many official post-processings have it for
        evaluation; a tracker would follow one object once per class.
    """

    nms_iou: float | None = None
    max_candidates: int = 3840
    multi_label: bool = False

    def __post_init__(self) -> None:
        DetectorConfig.__post_init__(self)
        if self.nms_iou is not None:
            check_share("nms_iou", self.nms_iou)
        check_count("max_candidates", self.max_candidates)


class DenseDetector(Detector):
    """The front end of its `spec`. Raises EngineError for an engine that does not fit, ConfigError for a
    manifest with other roles and for unknown classes.
    """

    config_type = DenseConfig
    spec: ClassVar[Spec]

    def __init__(self, runtime: Runtime, manifest: Manifest, config: DenseConfig | None = None) -> None:
        self._config = config or DenseConfig()
        self._layout_name, self._layout = _layout_of(self.spec, manifest)
        self._size = manifest.input.size
        self._iou = self._config.nms_iou or self.spec.nms_iou
        super().__init__(runtime, manifest, self._config)
        self._start()

    def __init_subclass__(cls) -> None:
        cls.layouts = tuple(cls.spec.layouts)

    @classmethod
    def describe(
        cls,
        runtime: Runtime,
        *,
        onnx_sha256: str,
        names: tuple[str, ...] | None = None,
        layout: str | None = None,
        size: tuple[int, int] | None = None,
        precision: Precision = "fp32",
    ) -> Manifest:
        """The manifest of an ONNX file as the official tools write it.

        layout: None is the first whose outputs the engine has, by number, name and what it says of their
        shapes. size: (width, height),
        needed where the file leaves it open. Raises EngineError where the engine has no such outputs.
        """
        spec = cls.spec
        names = spec.names if names is None else names
        if len(runtime.inputs) != 1:
            raise EngineError(
                f"a {spec.title} engine takes images and nothing else; this one takes "
                f"{', '.join(runtime.inputs)}: export it without its post-processing"
            )
        name, size = input_of(runtime, size)
        return Manifest(
            frontend=spec.name,
            input=Input(
                name=name,
                size=size,
                layout="NCHW",
                colour=spec.colour,
                mean=spec.mean,
                std=spec.std,
                resize=spec.resize,
                pad=spec.pad,
                interpolation=spec.interpolation,
            ),
            outputs=_roles_of(spec, runtime, layout, len(names)),
            names=names,
            precision=precision,
            onnx_sha256=onnx_sha256,
            engine_sha256=onnx_sha256,
        )

    def _check(self, outputs: Outputs) -> None:
        grid = grid_of(self.spec, self._layout, outputs, self._size, len(self.names), self._layout_name)
        check_finite(*outputs.values())
        device = next(iter(outputs.values())).device
        self._grid, self._wanted = grid.to(device), self._wanted.to(device)

    def _pack(self, outputs: Outputs) -> Tensor:
        raw = self._layout.split(outputs, self._size)
        return self._decode_all(raw) if raw.box.is_cuda else self._decode_found(raw)

    def _decode_found(self, raw: Raw) -> Tensor:
        """(N, V + 3): box, score, label and image of what the host finds, candidates alone looked at."""
        config = self._config
        likely = self._likely(raw)
        check_finite(likely)
        image, place = (likely >= config.conf).nonzero(as_tuple=True)
        score = self._score(raw.score[image, place], None if raw.objectness is None else likely[image, place])
        if raw.label is not None:
            label, row = raw.label[image, place].long(), torch.arange(len(image))
            score, chosen = score[:, 0], self._known(label)
        elif config.multi_label:
            row, label = ((score >= config.conf) & self._wanted).nonzero(as_tuple=True)
            score = score[row, label]
            chosen = torch.ones_like(row, dtype=torch.bool)
        else:
            (score, label), row = score.max(dim=1), torch.arange(len(image))
            chosen = (score >= config.conf) & self._wanted[label]
        row, score, label = row[chosen], score[chosen], label[chosen]
        image, place = image[row], place[row]
        cell = self._grid[place] if len(self._grid) > 1 else self._grid.expand(len(place), -1)
        box = self._layout.boxes(raw.box[image, place].float(), cell)
        check_finite(box)
        found = torch.cat((box, torch.stack((score, label, image), dim=1)), dim=1)
        if not self.spec.rotated:
            found = found[~_hollow(box)]  # before the strongest are taken, as on a GPU
        if len(found) > config.max_candidates:
            found = found[strongest(found[:, -3], found[:, -1].long(), config.max_candidates)]
        box, score, label, image = found[:, :-3], found[:, -3], found[:, -2].long(), found[:, -1].long()
        if not self._layout.suppress:
            return found[score.argsort(descending=True, stable=True)]
        group = image * len(self.names) + label
        suppress = rotated_nms if self.spec.rotated else nms
        return found[suppress(box, score, group, iou_threshold=self._iou)]

    def _decode_all(self, raw: Raw) -> Tensor:
        """(B, K, V + 2): box, score and label by falling score, then rows of score 0; every place decoded.

        NaN among the scores, or NaN or inf in a candidate's box, is in the score of some row.
        """
        config = self._config
        box = self._layout.boxes(raw.box.float(), self._grid)  # (B, A, V)
        objectness = None if raw.objectness is None else self._activated(raw.objectness)
        score = self._score(raw.score, objectness)  # (B, A, C)
        broken = (box * 0).sum(dim=2)  # NaN for NaN and inf, else 0
        full = torch.ones_like(broken) if self.spec.rotated else (broken != 0) | ~_hollow(box)
        if raw.label is not None:
            score, label = score[..., 0], raw.label.long()
            score = torch.where(self._known(label), score, 0.0) * full  # NaN stays
        elif config.multi_label:
            score = torch.where(self._wanted | score.isnan(), score, 0.0) * full[..., None]
            score, place = score.flatten(1).topk(min(config.max_candidates, score[0].numel()))
            label, place = place % len(self.names), place // len(self.names)
            box = box.gather(1, place[..., None].expand(-1, -1, box.shape[2]))
            broken = broken.gather(1, place)
        else:
            score, label = score.max(dim=2)
            score = torch.where(self._wanted[label] | score.isnan(), score, 0.0) * full
        score = torch.where(score < config.conf, 0.0, score + broken)
        rows = torch.cat((box, torch.stack((score, label), dim=2)), dim=2)
        if not self._layout.suppress:
            return rows
        suppress = kernels.rotated_nms if self.spec.rotated else kernels.nms
        return suppress(rows, iou_threshold=self._iou, limit=min(config.max_candidates, rows.shape[1]))

    def _unpack(self, packed: Packed, fits: Sequence[Fit], kept: Tensor | None) -> list[Detections]:
        if packed.ndim == 2:  # rows of all images, as many as there are
            return [self._detections(packed[packed[:, -1] == index], fit) for index, fit in enumerate(fits)]
        score = packed.shape[2] - 2
        if not np.isfinite(packed[..., score].sum()):
            raise not_finite()
        return [
            self._detections(rows[rows[:, score] > 0], fit) for rows, fit in zip(packed, fits, strict=True)
        ]

    def _detections(self, rows: Packed, fit: Fit) -> Detections:
        """Rows (N, 6 or more) of one image. Boxes may reach beyond it, as objects do."""
        if self.spec.rotated:
            return _rotated_detections(rows, fit)
        return Detections(
            xyxy=fit.to_source(rows[:, :4]).astype(np.float32),
            score=rows[:, 4].copy(),
            label=rows[:, 5].astype(np.int64),
        )

    def _likely(self, raw: Raw) -> Tensor:
        """(B, A) float32 that no score of the place exceeds."""
        return self._activated(raw.score.amax(dim=2) if raw.objectness is None else raw.objectness)

    def _score(self, score: Tensor, objectness: Tensor | None) -> Tensor:
        """(…, C) float32 in 0…1."""
        score = self._activated(score)
        return score if objectness is None else score * objectness[..., None]

    def _activated(self, score: Tensor) -> Tensor:
        return score.float().sigmoid() if self._layout.sigmoid else score.float()

    def _known(self, label: Tensor) -> Tensor:
        """Whether each label that an engine chose is a class to keep; −1 and the like mark empty rows."""
        there = (label >= 0) & (label < len(self.names))
        return there & self._wanted[label.clamp(0, len(self.names) - 1)]


def _hollow(xyxy: Tensor) -> Tensor:
    """(…) whether corners (…, 4) enclose nothing. Such boxes are no objects, as in mmdet (`min_bbox_size`);
    with an area below 0 one would suppress others that it does not touch.
    """
    return (xyxy[..., 2:] <= xyxy[..., :2]).any(dim=-1)


def _rotated_detections(rows: Packed, fit: Fit) -> Detections:
    """Rows (N, 7 or more): cxcywhr in the network input, score, label. The longer side comes first (le90).

    Boxes without area are nothing, as in mmrotate (`min_bbox_size`).
    """
    rows = rows[(rows[:, 2:4] > 0).all(axis=1)]
    box = rows[:, :5].astype(np.float64)
    box[:, :2] -= fit.offset
    width, height = (own / put for own, put in zip(fit.source_size, fit.resized, strict=True))
    box = long_side_first(scaled(box, width, height))
    return Detections(
        xyxy=unturned(box).astype(np.float32),
        score=rows[:, 5].copy(),
        label=rows[:, 6].astype(np.int64),
        angle=box[:, 4].astype(np.float32),
    )


def _layout_of(spec: Spec, manifest: Manifest) -> tuple[str, Layout]:
    """The layout with the manifest's roles."""
    for name, layout in spec.layouts.items():
        if layout.outputs.keys() == manifest.outputs.keys():
            return name, layout
    known = "; ".join(f"{name}: {', '.join(layout.outputs)}" for name, layout in spec.layouts.items())
    raise ConfigError(
        f"{spec.title} outputs are one of {known}; the manifest has {', '.join(manifest.outputs)}: write it "
        "again with tools/manifest.py"
    )


def _roles_of(spec: Spec, runtime: Runtime, layout: str | None, classes: int) -> dict[str, str]:
    wanted = spec.layouts if layout is None else {layout: spec.layouts[layout]}
    named = [
        (each, roles) for each in wanted.values() if (roles := each.tensors(runtime.outputs)) is not None
    ]
    for each, roles in named:
        shapes = {role: runtime.outputs[name][1:] for role, name in roles.items()}
        if all(
            could_be(shapes[role], dimensions(dims, None, classes)) for role, dims in each.outputs.items()
        ):
            return roles
    if named:
        return named[0][1]  # what opens the engine says how its shapes differ
    known = "; ".join(f"{name}: {', '.join(each.outputs)}" for name, each in wanted.items())
    raise EngineError(
        f"{spec.title} has outputs as one of {known}; the engine gives {', '.join(runtime.outputs)}: name "
        "another front end, or export it anew as docs/frontends.md says"
    )
