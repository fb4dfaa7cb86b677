"""Frames into the one input tensor of an engine, as its manifest describes it and the engine takes it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import torch

from tracker.boxes import Fit, fit_center, fit_corner, fit_corner_rounded, fit_stretch
from tracker.errors import EngineError
from tracker.manifest import Input
from tracker.pixels import Workspace, network_input, to_host
from tracker.types import Frame, Runtime

_FITS = {
    "corner": fit_corner,
    "corner_rounded": fit_corner_rounded,
    "center": fit_center,
    "stretch": fit_stretch,
}
_INTERPOLATIONS = {"linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "cubic": cv2.INTER_CUBIC}


class Preprocessor:
    """Fills the rows of one tensor (batch, 3, H, W) that it owns and reuses; for one thread at a time."""

    def __init__(self, spec: Input, batch: int) -> None:
        self._spec = spec
        width, height = spec.size
        self._tensor = torch.zeros(batch, 3, height, width)
        self._rows = self._tensor.numpy()  # the same memory
        self._work = Workspace()

    def __call__(self, frames: Sequence[Frame]) -> tuple[torch.Tensor, list[Fit]]:
        """The whole tensor, its first rows filled until the next call, and how each frame lies in its row."""
        spec, fits = self._spec, [fit_of(self._spec, frame) for frame in frames]
        for frame, fit, row in zip(frames, fits, self._rows, strict=False):  # a batch may be part full
            assert frame.image is not None, "a front end needs frames with images"
            network_input(
                to_host(frame.image),
                fit,
                out=row,
                work=self._work,
                rgb=spec.colour == "rgb",
                mean=spec.mean,
                std=spec.std,
                pad=spec.pad,
                interpolation=_INTERPOLATIONS[spec.interpolation],
            )
        return self._tensor, fits


def fit_of(spec: Input, frame: Frame) -> Fit:
    """How the input wants the frame placed."""
    return _FITS[spec.resize](frame.size, spec.size)


def batch_of(runtime: Runtime, spec: Input) -> int | None:
    """Images per run, None where the engine leaves it open; EngineError if it takes another input."""
    shape = runtime.inputs.get(spec.name)
    if tuple(runtime.inputs) != (spec.name,) or shape is None:
        raise EngineError(
            f"the manifest feeds the input {spec.name}, the engine takes {', '.join(runtime.inputs)}: "
            "correct the manifest"
        )
    wanted = (3, spec.size[1], spec.size[0])
    if len(shape) != 4 or any(have not in (None, want) for have, want in zip(shape[1:], wanted, strict=True)):
        raise EngineError(
            f"input {spec.name} has shape {shape}; {spec.size[0]}×{spec.size[1]} images need (batch, "
            f"{', '.join(map(str, wanted))}): correct the size, or name another front end"
        )
    return shape[0]
