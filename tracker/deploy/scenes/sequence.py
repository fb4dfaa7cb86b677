"""A scene as files: H.264 video, MOTChallenge ground truth, seqinfo.ini.

Knows nothing of how scenes come about.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from tracker.boxes import xyxy_to_xywh
from tracker.deploy.scenes.scene import PERSON, Scene, SceneConfig, Truth
from tracker.errors import ConfigError, SinkError

PEDESTRIAN, VEHICLE, DISTRACTOR = 1, 3, 8  # MOT17's numbers; distractors may be tracked or not


def write_sequence(
    seed: int,
    directory: Path,
    *,
    name: str | None = None,
    size: tuple[int, int] = (512, 288),
    seconds: float = 20.0,
    frame_rate: float = 25.0,
    people: int = 40,
    cars: int = 8,
    quality: int = 23,
) -> None:
    """Write video.mp4, gt.txt and seqinfo.ini into a directory, which is made if need be.

    gt.txt has MOTChallenge's nine columns: frame, id, x, y, w, h, consider, class, visibility; whole boxes,
    in pixels, ids from 1. Class 1 is a pedestrian, 3 a car. Where something is not `Truth.countable`, its row
    has consider 0 and class 8, distractor: it is not asked for, and MOT17's rule forgives finding it.
    quality: x264's constant rate factor, 0 best to 51.

    Raises ConfigError for parameters that no scene can have, SinkError when it cannot be written.
    """
    if not 0 < frame_rate <= 240 or not 0 <= quality <= 51:
        raise ConfigError(f"frame rate {frame_rate} must lie in 0…240, quality {quality} in 0…51")
    import av  # not needed where scenes are only trained on

    scene = Scene(seed, SceneConfig(size=size, seconds=seconds, people=people, cars=cars))
    frames = max(1, round(seconds * frame_rate))
    rate = Fraction(frame_rate).limit_denominator(1001)
    rows: list[str] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with av.open(directory / "video.mp4", "w") as container:
            stream = container.add_stream(
                "libx264", rate=rate, options={"crf": str(quality), "preset": "medium"}
            )
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            for index in range(frames):
                image, truth = scene.frame(index / frame_rate, compress=False)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
                rows += _rows(index + 1, truth, size)
            container.mux(stream.encode())
        (directory / "gt.txt").write_text("".join(rows), encoding="ascii")
        (directory / "seqinfo.ini").write_text(
            f"[Sequence]\nname={name or f'scene-{seed}'}\nimDir=img1\nframeRate={frame_rate:g}\n"
            f"seqLength={frames}\nimWidth={size[0]}\nimHeight={size[1]}\nimExt=.jpg\n",
            encoding="ascii",
        )
    except (OSError, ValueError) as error:  # FFmpeg's errors are both kinds
        raise SinkError(f"cannot write the sequence into {directory}: {error}") from error


def _rows(frame: int, truth: Truth, size: tuple[int, int]) -> list[str]:
    rows = []
    everything = zip(
        truth.identity,
        truth.label,
        xyxy_to_xywh(truth.xyxy),
        truth.visibility,
        truth.countable(size),
        strict=True,
    )
    for identity, label, (x, y, w, h), visibility, counts in everything:
        kind = (PEDESTRIAN if label == PERSON else VEHICLE) if counts else DISTRACTOR
        rows.append(
            f"{frame},{identity + 1},{x:.2f},{y:.2f},{w:.2f},{h:.2f},{int(counts)},{kind},{visibility:.3f}\n"
        )
    return rows
