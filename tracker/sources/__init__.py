"""Where frames come from: video files and images. `open_source` chooses by what it is given.

Siblings here share `Reader` (open once, read once, close any time) and the limit on picture sizes; nothing
in this package knows what is done with a frame.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from tracker.errors import SourceError
from tracker.sources.file import VideoFile
from tracker.sources.images import ImageFolder, is_image
from tracker.sources.limits import MAX_PIXELS
from tracker.types import Source

__all__ = ["MAX_PIXELS", "ImageFolder", "VideoFile", "open_source"]

# Path() turns "rtsp://" into "rtsp:/". One letter before the colon is a drive.
_NOT_LOCAL = re.compile(r"([a-z][a-z0-9+.-]+:/{1,2}|webcam:)", re.IGNORECASE)


def open_source(spec: str | Path, *, source: int = 0, max_pixels: int = MAX_PIXELS) -> Source:
    """A source for that file, directory or glob pattern; enter it to open it.

    source: its number in the run, for its frames. max_pixels: pictures larger than this are refused.

    Raises SourceError for URLs and webcams (never repeating the URL, which may hold a password) and for
    images that are not there. Whether a video file can be read shows on entering.
    """
    if live := _NOT_LOCAL.match(str(spec)):
        raise SourceError(
            f"{live[1]} sources are live and not in this version, which reads video files and images: "
            "record to a file first"
        )
    path = Path(spec)
    pattern = glob.has_magic(str(spec)) and not path.exists()
    kind = ImageFolder if path.is_dir() or is_image(path) or pattern else VideoFile
    return kind(spec, source=source, max_pixels=max_pixels)
