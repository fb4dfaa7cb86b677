"""Engines in parts: several plans in one file, each with an input of its own, run whenever somebody asks.

For detectors in two stages: what lies between the stages is the front end's. `deploy.build` makes such a
file. Like a plan it is code, and its hash is what the manifest checks. Builds nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tracker.errors import EngineError
from tracker.manifest import Manifest
from tracker.runtimes.tensorrt import REBUILD, TensorRTRuntime, read_engine

MAGIC = b"trkprt1\n"  # then the index's length, 8 bytes, little-endian, the index, and what it points to
_ALIGNMENT = 64  # bytes


class PartsRuntime(TensorRTRuntime):
    """One such file, loaded: its first part. Arguments, attributes and errors: see `TensorRTRuntime`.

    parts: the others, by the name of their input.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str | torch.device = "auto",
        manifest: Manifest | None = None,
        lanes: int | None = None,
        bindings: Any = None,
    ) -> None:
        content = read_engine(path)
        if manifest is not None:
            manifest.verify(path, content)
        (_, first), *others = unpack(content, str(path)).items()
        super().__init__(
            path, device=device, manifest=manifest, lanes=lanes, bindings=bindings, content=first
        )
        self.library += f" in {1 + len(others)} parts"
        self.parts: Mapping[str, TensorRTRuntime] = {
            name: TensorRTRuntime(
                path, device=device, manifest=manifest, lanes=lanes, bindings=bindings, content=plan
            )
            for name, plan in others
        }


def in_parts(path: Path) -> bool:
    """Whether a file is one of these. Raises EngineError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error


def pack(plans: Mapping[str, bytes]) -> bytes:
    """The file's content, of plans by input: magic, length of the index, index (JSON), plans as they are."""
    data, index = bytearray(), {}
    for name, plan in plans.items():
        data.extend(bytes(-len(data) % _ALIGNMENT))
        index[name] = [len(data), len(data) + len(plan)]
        data.extend(plan)
    text = json.dumps(index).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % _ALIGNMENT)
    return b"".join((MAGIC, len(text).to_bytes(8, "little"), text, data))


def unpack(content: bytes, name: str) -> dict[str, bytes]:
    """What `pack` put there. name: of the file, for messages.

    Raises EngineError for what is no such file, is cut short or says what cannot be.
    """
    begin = len(MAGIC) + 8
    length = int.from_bytes(content[len(MAGIC) : begin], "little")
    data = memoryview(content)[begin + length :]
    try:
        index = json.loads(content[begin : begin + length])
        plans = {str(part): bytes(data[first:last]) for part, (first, last) in index.items()}
        whole = content[: len(MAGIC)] == MAGIC and all(
            0 <= first < last <= len(data) for first, last in index.values()
        )
    except (ValueError, TypeError, AttributeError):  # neither JSON nor UTF-8, or another JSON
        whole = False
    if not whole or not plans:
        raise EngineError(f"{name} is no engine in parts or is cut short: copy it again, or {REBUILD}")
    return plans
