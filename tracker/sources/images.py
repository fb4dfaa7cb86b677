"""Still images as a video: a directory, a glob pattern, a MOTChallenge sequence or a single picture.

Knows file names and image files; the order is that of the numbers in the names.
"""

from __future__ import annotations

import configparser
import glob
import re
from collections.abc import Generator, Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from tracker.errors import SourceError
from tracker.sources.limits import MAX_PIXELS, check_size
from tracker.sources.reader import Reader
from tracker.types import Frame, Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FALLBACK_RATE = 30.0
_MOT_IMAGES = "img1"  # the MOTChallenge layout: sequence/img1/000001.jpg, with sequence/seqinfo.ini


class ImageFolder(Reader):
    """Images as a `Source`, decoded by OpenCV: turned as their Exif tag says, "bgr", 8 bits.

    spec: a directory (not searched further down), a MOTChallenge sequence, a glob pattern or one image.
    frame_rate: from seqinfo.ini beside the images' directory; else 30. An image that cannot be read is
    counted as corrupt and keeps its number.

    Raises SourceError: nothing there, no image in it, a seqinfo.ini that makes no sense; on entering, not
    one image readable; and there or while reading, one of more than max_pixels (2^30 for OpenCV itself).
    """

    def __init__(self, spec: str | Path, *, source: int = 0, max_pixels: int = MAX_PIXELS) -> None:
        self._spec = spec
        self._paths = _images(spec)
        folder = self._paths[0].resolve().parent
        sequence = folder.parent if folder.name == _MOT_IMAGES else folder
        super().__init__(Path(spec).stem if Path(spec) == self._paths[0] else sequence.name)
        self.counts.declared = len(self._paths)
        self.frame_rate = _frame_rate(folder.parent / "seqinfo.ini")
        self._source = source
        self._max_pixels = max_pixels

    def _read(self) -> Generator[Frame]:
        for index, path in enumerate(self._paths):
            pixels = _decode(path)
            if pixels is None:
                self.counts.corrupt += 1
                continue
            height, width = pixels.shape[:2]
            check_size(path, width, height, self._max_pixels)
            yield Frame(
                index=index,
                pts_seconds=index / self.frame_rate,
                size=(width, height),
                image=Image(format="bgr", planes=(pixels,)),
                source=self._source,
            )
        if self.counts.corrupt == len(self._paths):
            raise SourceError(f"{self._spec}: not one of {len(self._paths)} images could be read")


def _decode(path: Path) -> NDArray[np.uint8] | None:
    """(H, W, 3) BGR; None where there is no whole picture to be had."""
    try:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        return None
    return None if pixels is None else np.asarray(pixels, np.uint8)


def _images(spec: str | Path) -> list[Path]:
    """The images in order, at least one."""
    path = Path(spec)
    found: Iterable[Path]
    if path.is_dir():
        found = (path / _MOT_IMAGES if (path / _MOT_IMAGES).is_dir() else path).iterdir()
    elif path.is_file():
        found = (path,)
    elif glob.has_magic(str(spec)):
        # Path.glob takes no absolute patterns
        found = map(Path, glob.glob(str(spec), recursive=True))  # noqa: PTH207
    else:
        raise SourceError(f"{spec}: no such file or directory")
    images = [image for image in found if is_image(image) and image.is_file()]
    if not images:
        raise SourceError(f"{spec}: no images there; looked for {', '.join(SUFFIXES)}")
    return sorted(images, key=_natural_order)


def is_image(path: Path) -> bool:
    """Judged by the name alone; hidden files, such as other systems' resource forks, are none."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _natural_order(path: Path) -> tuple[list[str | int], str]:
    """Numbers by value: img2 before img10. Odd places always hold numbers, so keys can be compared."""
    parts = re.split(r"([0-9]+)", str(path))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], str(path)


def _frame_rate(seqinfo: Path) -> float:
    if not seqinfo.is_file():
        return _FALLBACK_RATE
    parser = configparser.ConfigParser()
    try:
        parser.read_string(seqinfo.read_text(encoding="utf-8"))
        rate = parser.getfloat("Sequence", "frameRate", fallback=_FALLBACK_RATE)
    except (OSError, ValueError, configparser.Error) as error:
        raise SourceError(f"{seqinfo}: cannot be understood: {error}".replace("\n", " ")) from error
    if not 0 < rate < float("inf"):
        raise SourceError(f"{seqinfo}: frameRate={rate:g} is no frame rate; it must be above 0")
    return rate
