"""Associations that misbehave, and lines to word, in a module that a worker process can import."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from tracker.association import Byte
from tracker.types import Detections, Frame, Tracks


@dataclass(frozen=True)
class NoConfig:
    pass


class Breaking:
    """As Byte, up to frame `at`: then it raises `error`, or gives its process signal `number` and hangs."""

    config, confirmed = NoConfig(), 0

    def __init__(self, at: int, error: Exception | None = None, number: int = 0) -> None:
        self._at, self._error, self._number = at, error, number
        self._byte = Byte()

    def update(self, frame_index: int, detections: Detections) -> Tracks:
        if frame_index == self._at and self._error is not None:
            raise self._error
        if frame_index == self._at:
            os.kill(os.getpid(), self._number)
            time.sleep(60)
        return self._byte.update(frame_index, detections)


class Talkative(Breaking):
    """Prints where answers are expected."""

    def update(self, frame_index: int, detections: Detections) -> Tracks:
        print("frame", frame_index, flush=True)
        os.write(1, b"from below Python, too\n")
        return super().update(frame_index, detections)


class Slow(Breaking):
    def update(self, frame_index: int, detections: Detections) -> Tracks:
        time.sleep(0.05)
        return super().update(frame_index, detections)


def long_lines(frame: Frame, tracks: Tracks) -> str:
    """Far more than a pipe holds."""
    return f"{frame.source} {frame.index} {len(tracks)} " + "x" * 300_000 + "\n"


def crowd(count: int, seed: int, *, dim: int | None = None) -> Detections:
    """Objects all over a 1920×1080 frame; with unit embeddings where `dim` is given."""
    chance = np.random.default_rng(seed)
    corner = chance.uniform(0, 900, (count, 2)).astype(np.float32)
    embedding = None
    if dim is not None:
        embedding = chance.standard_normal((count, dim)).astype(np.float32)
    return Detections(
        xyxy=np.concatenate((corner, corner + chance.uniform(10, 90, (count, 2)).astype(np.float32)), axis=1),
        score=chance.uniform(0.2, 1, count).astype(np.float32),
        label=chance.integers(0, 2, count),
        embedding=embedding,
    )
