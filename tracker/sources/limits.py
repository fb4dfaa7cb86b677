"""How large a picture may be: a few hundred kilobytes can decode to gigabytes, so sizes are checked."""

from __future__ import annotations

from tracker.errors import SourceError

# Admits 8K (7680×4320) and 8K DCI (8192×4320 = 35.4 million); 8192×8192 is already what bombs are made of.
MAX_PIXELS = 40_000_000


def check_size(what: object, width: int, height: int, max_pixels: int) -> None:
    """Raises SourceError where the picture is larger than the limit."""
    if width * height > max_pixels:
        raise SourceError(
            f"{what}: {width}×{height} pictures are over the limit of {max_pixels} pixels: "
            "scale the source down first, or raise max_pixels if you trust it"
        )
