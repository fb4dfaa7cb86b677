"""FairMOT: frames in, objects and what each looks like out.

Knows the network's heads (Zhang et al., "FairMOT", IJCV 2021; github.com/ifzhang/FairMOT, `models/decode.py`
and `utils/post_process.py`); how an engine wants its pixels, its manifest says, and who runs it does not
matter here. The manifest names an engine's outputs, each [B, channels, H/4, W/4], by role:

    "hm" or "peaks"   logits of the C classes' heat maps, or their scores where they peak and 0 elsewhere
    "wh"              distances of the left, top, right and bottom edges from the centre, or width and height
    "reg"             where in its cell the centre is, x and y
    "id"              appearance, of any norm
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from numpy.typing import NDArray
from torch import Tensor

from tracker.boxes import Fit
from tracker.errors import ConfigError, EngineError
from tracker.frontends.detector import (
    Detector,
    DetectorConfig,
    check_count,
    check_finite,
    input_of,
    not_finite,
)
from tracker.frontends.lanes import Outputs, Packed
from tracker.kernels.heads import decode_heads
from tracker.manifest import Input, Manifest, Precision
from tracker.types import Detections, Runtime

STRIDE = 4  # input pixels per cell
SCORES = ("hm", "peaks")
HEADS = ("wh", "reg", "id")


@dataclass(frozen=True, slots=True, kw_only=True)
class FairmotConfig(DetectorConfig):
    """conf lies below the official 0.4 (`src/lib/opts.py`), which is where the tracker's confidence begins.

    top_k: per frame, the strongest peaks of all classes; the official K.
    official_transform: boxes back to source pixels as the official code does it, up to a pixel off because
        it ignores how the letterbox was rounded, and boxes turned inside out kept; for comparisons.
    """

    top_k: int = 500
    official_transform: bool = False

    def __post_init__(self) -> None:
        DetectorConfig.__post_init__(self)
        check_count("top_k", self.top_k)


class Fairmot(Detector):
    """The front end. Raises EngineError for an engine that does not fit, ConfigError for unknown classes."""

    embeds = True
    config_type = FairmotConfig

    def __init__(self, runtime: Runtime, manifest: Manifest, config: FairmotConfig | None = None) -> None:
        self._config = config or FairmotConfig()
        self._scores = _score_role(manifest)
        super().__init__(runtime, manifest, self._config)
        self._kept = self._wanted.nonzero().squeeze(1)  # (kept,) of all classes
        self._labels = self._kept.numpy()
        self._size = manifest.input.size
        self._start()

    @staticmethod
    def describe(
        runtime: Runtime,
        *,
        onnx_sha256: str,
        names: tuple[str, ...] = ("person",),
        size: tuple[int, int] | None = None,
        precision: Precision = "fp32",
    ) -> Manifest:
        """The manifest of an ONNX file whose outputs are called as their roles are: hm or peaks, wh, reg, id.

        size: (width, height), needed where the file leaves it open. Pixels are as in the official code
        (`src/lib/datasets/dataset/jde.py`): RGB in 0..1 on grey 128, which is what OpenCV makes of its 127.5.
        """
        roles = [role for role in (*SCORES, *HEADS) if role in runtime.outputs]
        if len(runtime.inputs) != 1 or len(roles) != 1 + len(HEADS):
            raise EngineError(
                "a FairMOT engine has one input and the outputs hm (or peaks), wh, reg and id; this one "
                f"takes {', '.join(runtime.inputs)} and gives {', '.join(runtime.outputs)}"
            )
        name, size = input_of(runtime, size)
        return Manifest(
            frontend="fairmot",
            input=Input(
                name=name,
                size=size,
                layout="NCHW",
                colour="rgb",
                mean=(0.0, 0.0, 0.0),
                std=(255.0, 255.0, 255.0),
                resize="center",
                pad=128.0,
                interpolation="area",
            ),
            outputs={role: role for role in roles},
            names=names,
            precision=precision,
            onnx_sha256=onnx_sha256,
            engine_sha256=onnx_sha256,
        )

    def _pack(self, outputs: Outputs) -> Tensor:
        scores, limit = outputs[self._scores], self._config.top_k
        if len(self._kept) < len(self.names):
            scores = scores[:, self._kept]
        wh, reg, embedding = (outputs[role] for role in HEADS)
        if scores.is_cuda:
            logits = self._scores == "hm"
            return decode_heads(scores, wh, reg, embedding, logits=logits, limit=limit)
        peaks = peak_scores(scores) if self._scores == "hm" else scores
        return decode(peaks, wh, reg, embedding, limit=limit)

    def _unpack(self, packed: Packed, fits: Sequence[Fit], kept: Tensor | None) -> list[Detections]:
        if not np.isfinite(packed[..., 4].sum()):  # NaN counts as the highest peak
            raise not_finite()
        return [self._detections(image, fit) for image, fit in zip(packed, fits, strict=True)]

    def _detections(self, rows: NDArray[np.float32], fit: Fit) -> Detections:
        """Rows (K, 6 + D) of one image, by falling score. Boxes may reach beyond the image, as objects do."""
        found = rows[: np.count_nonzero(rows[:, 4] > self._config.conf)]
        if self._config.official_transform:
            xyxy = official_to_source(found[:, :4], fit)
        else:
            proper = (found[:, 2] > found[:, 0]) & (found[:, 3] > found[:, 1])
            found = found if proper.all() else found[proper]
            xyxy = fit.to_source(found[:, :4] * STRIDE)
        return Detections(
            xyxy=xyxy.astype(np.float32),
            score=found[:, 4].copy(),
            label=self._labels[found[:, 5].astype(np.int64)],
            embedding=found[:, 6:].copy(),
        )

    def _check(self, outputs: Outputs) -> None:
        width, height = self._size
        cells = (height // STRIDE, width // STRIDE)
        channels = {self._scores: (len(self.names),), "wh": (4, 2), "reg": (2,)}
        for role, output in outputs.items():
            shape, allowed = tuple(output.shape), channels.get(role)
            if len(shape) != 4 or shape[2:] != cells or (allowed and shape[1] not in allowed):
                expected = " or ".join(map(str, allowed)) if allowed else "D"
                raise EngineError(
                    f"output {self._roles[role]} has shape {shape}; as FairMOT's {role}, with a "
                    f"{width}×{height} input and {len(self.names)} class names, it has (1, {expected}, "
                    f"{cells[0]}, {cells[1]}): correct the size or the names, or name another front end"
                )
        check_finite(*outputs.values())
        self._kept = self._kept.to(outputs[self._scores].device)
        low, high = float(outputs[self._scores].min()), float(outputs[self._scores].max())
        looks_like = "peaks" if low >= 0 and high <= 1 else "hm"  # logits above 0 mean objects everywhere
        if looks_like != self._scores:
            raise EngineError(
                f"output {self._roles[self._scores]} is declared {self._scores}, but on an empty image its "
                f"values from {low:.3g} to {high:.3g} look like {looks_like}: declare it {looks_like}"
            )


def peak_scores(logits: Tensor) -> Tensor:
    """(B, C, H, W) heat maps → scores where no neighbour is stronger, 0 elsewhere. NaN stays NaN."""
    scores = torch.sigmoid(logits)
    around = F.max_pool2d(scores, 3, stride=1, padding=1)
    return torch.where(around > scores, 0.0, scores)


def decode(peaks: Tensor, wh: Tensor, reg: Tensor, embedding: Tensor, *, limit: int) -> Tensor:
    """(B, K, 6 + D): corners in cells, score, label and unit embedding of the K = `limit` strongest peaks.

    peaks: (B, C, H, W) scores, 0 where there is no peak; fewer peaks than K leave rows of score 0.
    wh: (B, 4 or 2, H, W). reg: (B, 2, H, W). embedding: (B, D, H, W). Computes in float32, by falling score,
    with shapes that do not depend on the values.
    """
    _, classes, height, width = peaks.shape
    limit = min(limit, classes * height * width)
    score, place = peaks.float().flatten(1).topk(limit)  # (B, K)
    label, cell = place // (height * width), place % (height * width)

    def at_peaks(head: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, K, channels)."""
        return head.flatten(2).gather(2, cell[:, None].expand(-1, head.shape[1], -1)).mT.float()

    centre = torch.stack((cell % width, cell // width), dim=2) + at_peaks(reg)
    sides = at_peaks(wh)
    low, high = (sides / 2, sides / 2) if sides.shape[2] == 2 else (sides[..., :2], sides[..., 2:])
    unit = F.normalize(at_peaks(embedding), dim=2)
    about = torch.stack((score, label), dim=2)
    return torch.cat((centre - low, centre + high, about, unit), dim=2)


def official_to_source(cells_xyxy: NDArray[np.float32], fit: Fit) -> NDArray[np.float64]:
    """(N, 4) corners in cells → source pixels as `ctdet_post_process` has them, its float32 steps included.

    It takes the map for a window on the source that has the input's aspect ratio and the source's centre,
    and so is wrong by what the letterbox rounds.
    """
    (width, height), (columns, rows) = fit.source_size, (side // STRIDE for side in fit.input_size)
    centre = np.array([width / 2, height / 2], np.float32)
    window = np.float32(max(fit.input_size[0] / fit.input_size[1] * height, width))
    # The transform is fitted to the centre and the corner half a window away, held as float32.
    reach = (centre - (centre - window * np.float32(0.5))).astype(np.float64)
    middle = np.array([columns, rows]) / 2
    scale = reach / (columns / 2)
    source: NDArray[np.float64] = (cells_xyxy.astype(np.float64) - np.tile(middle, 2)) * np.tile(
        scale, 2
    ) + np.tile(centre, 2)
    return source


def _score_role(manifest: Manifest) -> str:
    """The one of SCORES that the manifest has; ConfigError unless the other roles are as they must be."""
    roles = tuple(manifest.outputs)
    scores = [role for role in roles if role in SCORES]
    if len(scores) != 1 or set(roles) != {*scores, *HEADS}:
        raise ConfigError(
            f"FairMOT outputs are hm or peaks, and {', '.join(HEADS)}; the manifest has {', '.join(roles)}"
        )
    return scores[0]
