"""Where frames come from: video files and images. `open_source` chooses by what it is given.

Siblings here share `Reader` (open once, read once, close any time) and the limit on picture sizes; nothing
in this package knows what is done with a frame.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Literal

import torch

from tracker.errors import ConfigError, EngineError, SourceError
from tracker.sources.file import VideoFile
from tracker.sources.images import ImageFolder, is_image
from tracker.sources.limits import MAX_PIXELS
from tracker.sources.nvdec import Look, NvdecFile, examine
from tracker.types import Source

__all__ = ["MAX_PIXELS", "Decode", "ImageFolder", "NvdecFile", "VideoFile", "open_source"]

Decode = Literal["auto", "cpu", "gpu"]

# Path() turns "rtsp://" into "rtsp:/". One letter before the colon is a drive.
_NOT_LOCAL = re.compile(r"([a-z][a-z0-9+.-]+:/{1,2}|webcam:)", re.IGNORECASE)


def open_source(
    spec: str | Path,
    *,
    source: int = 0,
    max_pixels: int = MAX_PIXELS,
    gpu: torch.device | None = None,
    decode: Decode = "auto",
) -> Source:
    """A source for that file, directory or glob pattern; enter it to open it.

    source: its number in the run, for its frames. max_pixels: pictures larger than this are refused.
    gpu: where frames are wanted, if not on the host. decode: "gpu" for NVDEC there, "cpu", or "auto": NVDEC
    where frames are wanted on a GPU and it can decode the file; if not, the source's `decoder` says why.

    Raises SourceError for URLs and webcams (never repeating the URL, which may hold a password), for images
    that are not there, and for videos that NVDEC was asked to decode and cannot. Whether a video file can be
    read shows on entering at the latest. Raises ConfigError for NVDEC without a GPU, EngineError without its
    library.
    """
    if live := _NOT_LOCAL.match(str(spec)):
        raise SourceError(
            f"{live[1]} sources are live and not in this version, which reads video files and images: "
            "record to a file first"
        )
    path = Path(spec)
    pattern = glob.has_magic(str(spec)) and not path.exists()
    if path.is_dir() or is_image(path) or pattern:
        return ImageFolder(spec, source=source, max_pixels=max_pixels)
    if decode == "gpu" and gpu is None:
        raise ConfigError("--decode gpu needs an engine that runs on a GPU: use --decode auto")
    if gpu is None or decode == "cpu":
        return VideoFile(path, source=source, max_pixels=max_pixels)
    look = _look(path, gpu, decode, max_pixels)
    if isinstance(look, str):
        return VideoFile(path, source=source, max_pixels=max_pixels, decoder=f"CPU, because {look}")
    return NvdecFile(path, look, device=gpu, source=source, max_pixels=max_pixels)


def _look(path: Path, gpu: torch.device, decode: Decode, max_pixels: int) -> Look | str:
    """What NVDEC needs to know of a file, or why it is not NVDEC that decodes it."""
    try:
        look = examine(path, gpu, max_pixels=max_pixels)
    except EngineError as error:
        if decode == "gpu":
            raise
        return str(error)
    if isinstance(look, str) and decode == "gpu":
        raise SourceError(f"{path}: NVDEC cannot decode it, because {look}: use --decode auto")
    return look
