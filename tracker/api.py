"""`tracker.track`: the same run as the command `track`, as a Python iterator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tracker.types import Frame, Track

if TYPE_CHECKING:
    from os import PathLike


def track(
    source: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    engine: str | PathLike[str],
    save: Sequence[str] = (),
    **options: Any,
) -> Iterator[tuple[Frame, list[Track]]]:
    """Track a video, an image directory, or several of them; yields every frame with its tracks.

        for frame, tracks in tracker.track("video.mp4", engine="engines/yolox_nano.onnx"):
            for track in tracks:
                print(frame.index, track.id, track.xyxy, track.score, track.label)

    Of several sources `frame.source` says which one a frame is from. Live ones (`rtsp://…`, `webcam:0`, or
    files with realtime=True) go on until you stop. Writes nothing unless `save` names kinds of result
    ("mot", "jsonl", "dota", "mots", "video"); the other options are the fields of `session.Options`, which
    are those of the command. Stop iterating whenever you like: threads and files are closed with the
    iterator, and results of an unfinished run stay marked partial.

    Raises TrackerError at the first step for a source, engine or option that cannot be used; and at the
    end, after every good frame has been yielded, SourceError for a source that broke half-way. Frames that
    were damaged or missing are counted, not raised: the command's exit code 1 is the summary's business.
    """
    # Torch, OpenCV and the engine's runtime load here, so that `import tracker` costs nothing.
    from tracker.live import open_session
    from tracker.session import Session, options_from

    sources = [source] if isinstance(source, str) or hasattr(source, "__fspath__") else list(source)
    named = {"sources": [str(each) for each in sources], "engine": str(engine), "save": save}
    with open_session(options_from({**options, **named})) as session:
        for frame, tracks in session:
            yield frame, list(tracks)
        streams = session.streams if isinstance(session, Session) else session.streams.all()
        for stream in streams:
            if stream.error is not None:
                raise stream.error
