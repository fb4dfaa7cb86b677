"""Files that hold several plans: a magic, the index's length (8 bytes, little-endian), the index (JSON), and
what it points to, each piece on a multiple of 64 bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tracker.errors import EngineError

_ALIGNMENT = 64  # bytes


class Pieces:
    """What an index points to, while it is put together."""

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, content: bytes | memoryview) -> list[int]:
        """Where it lies: first byte, and the one behind the last."""
        self._data.extend(bytes(-len(self._data) % _ALIGNMENT))
        self._data.extend(content)
        return [len(self._data) - len(content), len(self._data)]

    def packed(self, magic: bytes, index: object) -> bytes:
        """The file's content."""
        text = json.dumps(index).encode()
        text += b" " * (-(len(magic) + 8 + len(text)) % _ALIGNMENT)
        return b"".join((magic, len(text).to_bytes(8, "little"), text, self._data))


class Container:
    """A file's content, taken apart. index: as JSON has it. Raises ValueError saying why it is none."""

    def __init__(self, content: bytes, magic: bytes) -> None:
        whole, begin = memoryview(content), len(magic) + 8
        if content[: len(magic)] != magic:
            raise ValueError("it does not begin as one")
        length = int.from_bytes(content[len(magic) : begin], "little")
        if length > len(whole) - begin:
            raise ValueError("it is cut short")
        self._data = whole[begin + length :]
        self.index: Any = None
        try:
            self.index = json.loads(bytes(whole[begin : begin + length]))
        except ValueError as error:  # neither JSON nor UTF-8
            raise ValueError("what it holds cannot be read") from error

    def piece(self, place: Any) -> memoryview:
        """ValueError for a place outside, TypeError for what is none."""
        first, last = place
        if not 0 <= first <= last <= len(self._data):
            raise ValueError(f"it is cut short: {len(self._data)} bytes where there should be {last}")
        return self._data[first:last]


def begins_with(path: Path, magic: bytes) -> bool:
    """Raises EngineError where the file cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
