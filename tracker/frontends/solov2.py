"""SOLOv2: objects by where they are, each with a convolution of its own that draws its mask.

Wang et al., "SOLOv2: Dynamic and Fast Instance Segmentation" (NeurIPS 2020); mmdet's
`mmdet/models/dense_heads/solov2_head.py`, whose thresholds are the official repository's. The manifest names
an engine's outputs by role, A being the 3872 cells of five grids, level by level, row by row:

    "cate_logits" or "cate"   (B, A, C) logits of the classes, or their scores after the points NMS: 0 where
                              one of the cells above, to the left and above left has a higher score
    "kernel"                  (B, A, E) of each cell: weights of a 1×1 convolution
    "seg"                     (B, E, H/4, W/4) what it is applied to

An object is one class here, the best of its cell, unless `multi_label` says as mmdet does that each is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
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
from tracker.frontends.lanes import Answer, Outputs, Packed
from tracker.frontends.mask_upsampling import upsampled
from tracker.frontends.matrix_nms import matrix_nms
from tracker.manifest import Manifest, Precision
from tracker.masks import MaskBits
from tracker.types import Detections, Runtime

GRIDS = (40, 36, 24, 16, 12)  # cells along either side, by level
LEAST_AREAS = (8, 8, 16, 32, 32)  # cells of "seg" that a mask must exceed, by level: the levels' strides
CELLS = sum(side * side for side in GRIDS)
STRIDE = 4  # of "seg"
SCORES = ("cate_logits", "cate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Solov2Config(DetectorConfig):
    """conf: least score at the end, after the factor for how sure the mask is and after the NMS; 0.05 in
    mmdet.

    candidate: score of its class above which a cell is looked at. mask: probability above which a pixel is in
    a mask. max_candidates: per frame, the strongest that take part in the NMS. max_objects: per frame, the
    strongest after it. multi_label: see above.
    """

    candidate: float = 0.1
    mask: float = 0.5
    max_candidates: int = 500
    max_objects: int = 100
    multi_label: bool = False

    def __post_init__(self) -> None:
        DetectorConfig.__post_init__(self)
        check_share("candidate", self.candidate)
        check_share("mask", self.mask)
        check_count("max_candidates", self.max_candidates)
        check_count("max_objects", self.max_objects)


class Solov2(Detector):
    """The front end. Raises EngineError for an engine that does not fit, ConfigError for unknown classes."""

    masks = True
    config_type = Solov2Config

    def __init__(self, runtime: Runtime, manifest: Manifest, config: Solov2Config | None = None) -> None:
        self._config = config or Solov2Config()
        self._scores = _score_role(manifest)
        super().__init__(runtime, manifest, self._config)
        self._least = torch.cat(
            [torch.full((side * side,), float(least)) for side, least in zip(GRIDS, LEAST_AREAS, strict=True)]
        )
        self._size = manifest.input.size
        self._start()

    @staticmethod
    def describe(
        runtime: Runtime,
        *,
        onnx_sha256: str,
        names: tuple[str, ...] = COCO_NAMES,
        size: tuple[int, int] | None = None,
        precision: Precision = "fp32",
    ) -> Manifest:
        """The manifest of an ONNX file whose outputs are called as their roles are, in any order: cate_logits
        or cate, kernel, seg.

        size: (width, height), needed where the file leaves it open. Pixels are as in mmdet: RGB, normalised,
        0 around them.
        """
        roles = [role for role in (*SCORES, "kernel", "seg") if role in runtime.outputs]
        if len(runtime.inputs) != 1 or len(roles) != 3:
            raise EngineError(
                "a SOLOv2 engine has one input and the outputs cate_logits (or cate), kernel and seg; this "
                f"one takes {', '.join(runtime.inputs)} and gives {', '.join(runtime.outputs)}"
            )
        return Manifest(
            frontend="solov2",
            input=mmdet_input(runtime, size),
            outputs={role: role for role in roles},
            names=names,
            precision=precision,
            onnx_sha256=onnx_sha256,
            engine_sha256=onnx_sha256,
        )

    def _check(self, outputs: Outputs) -> None:
        width, height = self._size
        kernel = outputs["kernel"].shape[-1]
        expected = {
            self._scores: (1, CELLS, len(self.names)),
            "kernel": (1, CELLS, kernel),
            "seg": (1, kernel, height // STRIDE, width // STRIDE),
        }
        for role, shape in expected.items():
            given = tuple(outputs[role].shape)
            if given != shape:
                raise EngineError(
                    f"output {self._roles[role]} has shape {given}; SOLOv2's {role}, with a {width}×{height} "
                    f"input and {len(self.names)} class names, has {shape}: correct the size or the names, "
                    "or name another front end"
                )
        check_finite(*outputs.values())
        device = outputs["seg"].device
        self._least, self._wanted = self._least.to(device), self._wanted.to(device)
        low, high = float(outputs[self._scores].min()), float(outputs[self._scores].max())
        if self._scores == "cate" and not (low >= 0 and high <= 1):
            raise EngineError(
                f"output {self._roles['cate']} is declared cate, but its values from {low:.3g} to {high:.3g} "
                "are no scores: declare it cate_logits"
            )

    def _pack(self, outputs: Outputs) -> Answer:
        """(B, N, 2) score and label by falling score, then rows of score 0; kept: (B, N, h, w) float32
        probabilities of their masks. NaN among what is looked at is in some score.

        On the host, N is as many as the image with most of them has.
        """
        config = self._config
        score, label, place = self._candidates(outputs[self._scores])
        found = [
            self._instances(*rows, outputs["kernel"][image], outputs["seg"][image])
            for image, rows in enumerate(zip(score, label, place, strict=True))
        ]
        score, label, kept = (torch.stack(parts) for parts in zip(*found, strict=True))
        score = torch.where(score < config.conf, 0.0, score)
        if not score.is_cuda:
            most = int((score != 0).sum(dim=1).max())
            score, label, kept = score[:, :most], label[:, :most], kept[:, :most]
        return Answer(torch.stack((score, label), dim=2), kept)

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K) scores, labels and cells of the strongest, by falling score; below `candidate`, score 0."""
        config = self._config
        scores = scores.float()
        if self._scores == "cate_logits":
            scores = points_nms(scores.sigmoid())
        scores = torch.where(self._wanted | scores.isnan(), scores, 0.0)
        scores = torch.where(scores <= config.candidate, 0.0, scores)
        if config.multi_label:
            flat, label = scores.flatten(1), None
        else:
            flat, label = scores.max(dim=2)
        most = min(config.max_candidates, flat.shape[1])
        if not flat.is_cuda:  # where asking costs a wait, all take part
            most = min(most, max(1, int((flat != 0).sum(dim=1).max())))
        score, place = flat.topk(most, dim=1)
        if label is None:
            classes = scores.shape[2]
            return score, place % classes, place // classes
        return score, label.gather(1, place), place

    def _instances(
        self, score: Tensor, label: Tensor, place: Tensor, kernels: Tensor, seg: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one image's candidates (K,), those that matrix NMS leaves: (N,) scores and labels by falling
        score, (N, h, w) probabilities.
        """
        config = self._config
        probability = (kernels[place].float() @ seg.float().flatten(1)).sigmoid()  # (K, h·w)
        inside = (probability > config.mask).float()
        area = inside.sum(dim=1)
        sureness = (probability * inside).sum(dim=1) / area.clamp(min=1)
        broken = probability.sum(dim=1) * 0  # NaN for NaN
        score = torch.where(area > self._least[place], score * sureness, 0.0) + broken
        score, order = matrix_nms(inside, area, label, score)
        score, best = score.topk(min(config.max_objects, len(score)))
        chosen = order[best]
        return score, label[chosen], probability[chosen].view(-1, *seg.shape[1:])

    def _finish(self, answer: Tensor | Answer, fits: Sequence[Fit]) -> Answer:
        """(B, N, 6) box in source pixels, score and label; kept: all images' bits, one after the other."""
        assert isinstance(answer, Answer)
        threshold = self._config.mask
        made = [
            upsampled(masks, rows[:, 0], fit, threshold)
            for masks, rows, fit in zip(answer.kept, answer.packed, fits, strict=True)
        ]
        boxes = torch.stack([each for _, each in made])
        kept = torch.cat([bits.flatten() for bits, _ in made])
        return Answer(torch.cat((boxes, answer.packed), dim=2), kept)

    def _unpack(self, packed: Packed, fits: Sequence[Fit], kept: Tensor | None) -> list[Detections]:
        assert kept is not None
        if not np.isfinite(packed[..., 4].sum()):
            raise not_finite()
        shapes = [(packed.shape[1], fit.source_size[1], -(-fit.source_size[0] // 8)) for fit in fits]
        bits = torch.split(kept, [int(np.prod(shape)) for shape in shapes])
        return [
            self._detections(rows, own.view(shape), fit)
            for rows, own, shape, fit in zip(packed, bits, shapes, fits, strict=True)
        ]

    def _detections(self, rows: Packed, bits: Tensor, fit: Fit) -> Detections:
        """Rows (N, 6) of one image, and their masks. A mask without a pixel in the source is nothing."""
        found = np.flatnonzero((rows[:, 4] > 0) & (rows[:, 2] > rows[:, 0]))
        rows = rows[found]
        # A copy of what there is: one object that is remembered must not keep a whole batch's masks.
        masks = MaskBits(bits[: found[-1] + 1 if len(found) else 0].clone(), fit.source_size)
        return Detections(
            xyxy=rows[:, :4].copy(),
            score=rows[:, 4].copy(),
            label=rows[:, 5].astype(np.int64),
            mask=masks[found],
        )


def points_nms(scores: Tensor) -> Tensor:
    """(B, A, C) scores → 0 where the cell above, to the left or above left has a higher one. NaN stays NaN.

    Pooling over 2×2 cells, as mmdet has it.
    """
    levels = []
    for level, side in zip(torch.split(scores, [side * side for side in GRIDS], dim=1), GRIDS, strict=True):
        grid = level.view(len(scores), side, side, -1)
        around = F.pad(grid, (0, 0, 1, 0, 1, 0))  # (B, side + 1, side + 1, C)
        column = torch.maximum(around[:, :-1], around[:, 1:])
        highest = torch.maximum(column[:, :, :-1], column[:, :, 1:])
        levels.append(torch.where(highest > grid, 0.0, grid).flatten(1, 2))
    return torch.cat(levels, dim=1)


def _score_role(manifest: Manifest) -> str:
    """The one of SCORES that the manifest has; ConfigError unless the other roles are as they must be."""
    roles = tuple(manifest.outputs)
    scores = [role for role in roles if role in SCORES]
    if len(scores) != 1 or set(roles) != {*scores, "kernel", "seg"}:
        raise ConfigError(
            f"SOLOv2 outputs are cate_logits or cate, kernel and seg; the manifest has {', '.join(roles)}"
        )
    return scores[0]
