"""How a detector's outputs are described: what a new front end has to say, and nothing that runs it.

A `Spec` is one detector: its pixels, and the layouts that its exporters write. A `Layout` is one set of
outputs: their shapes, where boxes and scores lie in them (`split`: views, so that nothing is computed for
places that hold nothing), and what the numbers of a box mean (`boxes`: on any number of rows at once).
`dense.py` runs them, `geometry.py` has the usual meanings. docs/frontends.md adds one step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tracker.errors import EngineError
from tracker.frontends.coco import COCO_NAMES
from tracker.frontends.lanes import Outputs
from tracker.manifest import Colour, Interpolation, Resize, Triple

Size = tuple[int, int]
Dimensions = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Raw:
    """What an engine says of A places of each of B images.

    box: (B, A, V) whatever boxes are decoded from. score: (B, A, C) of the classes, or with `label` (B, A)
    that the engine has chosen (B, A, 1). objectness: (B, A) a factor of all scores.
    """

    box: Tensor
    score: Tensor
    objectness: Tensor | None = None
    label: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to write a detector's outputs.

    outputs: role → shape after the batch, in A (places of the grid), C (classes), K (any number), numbers,
        and sums such as "4+C".
    split: outputs by role and the input's (width, height) → Raw.
    boxes: rows (…, V) and their cells (…, 3) → corners (…, 4) in input pixels, or for rotated boxes
        cxcywhr (…, 5), see `boxes.turned`. A cell is its column, row and stride; zeros where outputs have
        no A.
    sigmoid: scores are logits. suppress: boxes of one object are many, so NMS follows.
    called: what exporters name the tensors, by role, where they are several.
    """

    outputs: Mapping[str, Dimensions]
    split: Callable[[Outputs, Size], Raw]
    boxes: Callable[[Tensor, Tensor], Tensor]
    sigmoid: bool = False
    suppress: bool = True
    called: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def tensors(self, names: Mapping[str, object]) -> dict[str, str] | None:
        """Role → which of an engine's outputs it is, None where these cannot be this layout's."""
        if len(self.outputs) == len(names) == 1:
            return dict(zip(self.outputs, names, strict=True))
        found = {
            role: name
            for role in self.outputs
            for name in names
            if name in (role, *self.called.get(role, ()))
        }
        return found if len(found) == len(self.outputs) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One detector.

    name: in manifests and options. title: for people. layouts: by name; the first is what its own tools
    write. pyramids: strides of the grids that its networks may have. anchors: places per cell. nms_iou: the
    official overlap above which the weaker of two boxes of a class is dropped. rotated: boxes have angles.
    The rest: as in `manifest.Input`.
    """

    name: str
    title: str
    layouts: Mapping[str, Layout]
    nms_iou: float
    colour: Colour = "rgb"
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (255.0, 255.0, 255.0)
    resize: Resize = "center"
    pad: float | Triple = 114.0
    interpolation: Interpolation = "linear"
    pyramids: tuple[tuple[int, ...], ...] = ((8, 16, 32),)
    anchors: int = 1
    names: tuple[str, ...] = COCO_NAMES
    rotated: bool = False


def cells(size: Size, strides: tuple[int, ...], anchors: int = 1) -> Tensor:
    """(A, 3) column, row and stride of every place, level by level, anchor by anchor, row by row."""
    levels = []
    for stride in strides:
        row_column = torch.cartesian_prod(torch.arange(size[1] // stride), torch.arange(size[0] // stride))
        level = torch.cat((row_column.flip(1), torch.full((len(row_column), 1), stride)), dim=1)
        levels.append(level.repeat(anchors, 1))
    return torch.cat(levels).float()


def dimensions(shape: Dimensions, places: int | None, classes: int) -> tuple[int | None, ...]:
    """The numbers that a shape stands for, None for any; places: None is any as well."""

    def number(term: str) -> int | None:
        parts = term.split("+")
        if term == "K" or (places is None and "A" in parts):
            return None
        known = {"A": places or 0, "C": classes}
        return sum(known[part] if part in known else int(part) for part in parts)

    return tuple(map(number, shape))


def fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want in (None, have) for have, want in zip(shape, wanted, strict=True)
    )


def could_be(shape: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    """As `fits`, of a shape with dimensions left open."""
    return len(shape) == len(wanted) and all(
        have is None or want in (None, have) for have, want in zip(shape, wanted, strict=True)
    )


def grid_of(spec: Spec, layout: Layout, outputs: Outputs, size: Size, classes: int, name: str) -> Tensor:
    """(A, 3) cells of the pyramid that the shapes of the outputs agree with, (1, 3) zeros without a grid.

    name: of the layout. Raises EngineError where no pyramid agrees, for the input size or for the outputs.
    """
    if not any("A" in term.split("+") for shape in layout.outputs.values() for term in shape):
        _check_shapes(spec, layout, outputs, size, classes, 0, name)
        return torch.zeros(1, 3)
    coarsest = spec.pyramids[0][-1]
    if size[0] % coarsest or size[1] % coarsest:
        raise EngineError(f"input size is {size[0]}×{size[1]}; {spec.title} needs multiples of {coarsest}")
    grids = [cells(size, strides, spec.anchors) for strides in spec.pyramids]
    for grid in grids:
        try:
            _check_shapes(spec, layout, outputs, size, classes, len(grid), name)
        except EngineError:
            continue
        return grid
    _check_shapes(spec, layout, outputs, size, classes, len(grids[0]), name)
    raise AssertionError("unreachable: that check has failed before")


def _check_shapes(
    spec: Spec, layout: Layout, outputs: Outputs, size: Size, classes: int, places: int, name: str
) -> None:
    for role, shape in layout.outputs.items():
        wanted, have = dimensions(shape, places, classes), tuple(outputs[role].shape)
        if not have or not fits(have[1:], wanted):
            expected = ", ".join("any" if number is None else str(number) for number in (1, *wanted))
            raise EngineError(
                f"output {role} has shape {have}; {spec.title} ({name}) with a {size[0]}×{size[1]} input and "
                f"{classes} class names gives ({expected}): correct the size or the names, or name another "
                "layout or front end"
            )
