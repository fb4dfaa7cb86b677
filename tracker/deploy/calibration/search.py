"""Which layers a reduced precision must leave alone: as few as keep tracking within bounds.

    rank      each layer reduced by itself, by how much that changes the detections of a few frames
    fewest    the shortest beginning of that ranking that must be kept, by bisection on a judge's word

Serves INT8 and half precision alike: what reduces a graph is the caller's. Knows no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import onnx

from tracker.deploy.calibration.judge import JudgeConfig, disagreement, found_in, opened
from tracker.errors import EngineError
from tracker.manifest import Manifest
from tracker.types import Detections, Frame

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Try(Generic[V]):
    """One step of the bisection: so many layers kept, the judge's verdict, whether that is within bounds."""

    kept: int
    verdict: V
    good: bool


@dataclass(frozen=True, slots=True)
class Found(Generic[V]):
    """kept: names of the layers to keep. verdict: with these kept. tries: in the order they were made."""

    kept: tuple[str, ...]
    verdict: V
    tries: tuple[Try[V], ...]


def rank(
    model: onnx.ModelProto,
    manifest: Manifest,
    layers: Sequence[str],
    alone: Callable[[str], onnx.ModelProto],
    frames: Sequence[Frame],
    config: JudgeConfig,
    on_layer: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """`disagreement` with the FP32 model for each layer reduced by itself, the greatest first.

    alone: the graph with that one layer reduced. A network that then answers NaN counts as infinite.
    """
    expected = _answers(model, manifest, frames, config)
    changes = {}
    for done, name in enumerate(layers, start=1):
        try:
            changes[name] = disagreement(expected, _answers(alone(name), manifest, frames, config))
        except EngineError:
            changes[name] = math.inf
        if on_layer is not None:
            on_layer(done)
    return dict(sorted(changes.items(), key=lambda item: -item[1]))


def fewest(
    ranked: Sequence[str],
    judged: Callable[[Sequence[str]], tuple[V, bool]],
    on_try: Callable[[Try[V]], object] | None = None,
) -> Found[V] | None:
    """The fewest of the ranked layers, from the first, with which the judge is content; None if not even
    with all of them.

    judged: the verdict with these layers kept, and whether it is good. What more layers kept make of a
    verdict is taken to be no worse.
    """
    tries: list[Try[V]] = []

    def attempt(count: int) -> Try[V]:
        verdict, good = judged(ranked[:count])
        tries.append(Try(count, verdict, good))
        if on_try is not None:
            on_try(tries[-1])
        return tries[-1]

    bad, best = -1, attempt(0)
    if not best.good:
        bad, best = 0, attempt(len(ranked))
        if not best.good:
            return None
    while best.kept - bad > 1:
        step = attempt(_between(bad, best.kept))
        if step.good:
            best = step
        else:
            bad = step.kept
    return Found(tuple(ranked[: best.kept]), best.verdict, tuple(tries))


def _between(bad: int, good: int) -> int:
    """Geometric: few layers do most harm, so the answer is nearer the beginning."""
    return min(max(round(math.sqrt((bad + 1) * good)), bad + 1), good - 1)


def _answers(
    model: onnx.ModelProto, manifest: Manifest, frames: Sequence[Frame], config: JudgeConfig
) -> list[Detections]:
    with opened(model, manifest, config) as frontend:
        return found_in(frontend, frames)
