"""`make demo`: tracks a clip and shows what came of it.

No model ships yet, so this generates a street scene with exact ground truth, and detections as an imperfect
detector would give them (jittered, missed, invented, weak where people are hidden, with embeddings). The
rest is the real thing: the clip is decoded, tracked, annotated and evaluated as any video would be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tracker.association import make_association
from tracker.errors import TrackerError
from tracker.evaluation import evaluate, find_pairs
from tracker.pipeline import Feed, Pipeline
from tracker.progress import Progress
from tracker.sinks import open_sinks
from tracker.sources import open_source
from tracker.synthetic import Scene, write_truth, write_video
from tracker.types import Detections, Frame

OUT = Path("runs/demo")


class SceneDetector:
    """Stands where an engine would: answers each frame with the scene's simulated detections."""

    names = ("person",)
    max_batch = 1
    embeds = True
    seconds: dict[str, float] = {}  # noqa: RUF012 - nothing is timed here

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def submit(self, frames: Sequence[Frame]) -> Answer:
        return Answer([self._scene.detections(frame.index) for frame in frames])

    def close(self) -> None:
        """Nothing is held."""


class Answer:
    def __init__(self, detections: list[Detections]) -> None:
        self._detections = detections

    def result(self) -> list[Detections]:
        return self._detections


def main() -> int:
    scene = Scene(seed=7, size=(960, 540), frame_rate=25.0, objects=14, frames=300)
    clip, truth = OUT / "clip.mp4", OUT / "truth.txt"
    OUT.mkdir(parents=True, exist_ok=True)
    print("No model ships yet: this demo tracks simulated detections on a clip it generates itself.")
    write_video(scene, clip)
    write_truth(scene, truth)
    with ExitStack() as stack:
        source = stack.enter_context(open_source(clip))
        sinks = open_sinks(("mot", "jsonl", "video"), OUT, "tracks", frame_rate=source.frame_rate)
        for sink in sinks:
            stack.push(lambda kind, *rest, sink=sink: sink.close(complete=kind is None))
        association = make_association("jde", frame_rate=source.frame_rate, names=SceneDetector.names)
        feed = stack.enter_context(Feed(source))
        progress = stack.enter_context(Progress(source.counts.declared, quiet=False))
        pipeline = Pipeline([feed], SceneDetector(scene), [association])
        for done, (frame, tracks) in enumerate(pipeline, 1):
            for sink in sinks:
                sink.write(frame, tracks)
            progress.update(done, len(tracks), "clip")
    print(evaluate(find_pairs(truth, OUT / "tracks.txt")).table())
    print(f"\nLook at {OUT}/tracks.mp4; the tracks are in {OUT}/tracks.txt and tracks.jsonl.")
    print("To track a video of your own:  .venv/bin/track VIDEO --engine MODEL.onnx  (see README.md)")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrackerError as error:
        sys.exit(f"demo: {error}")
