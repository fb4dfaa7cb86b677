"""Engines in parts: several plans in one file, each with an input of its own, run whenever somebody asks.

For detectors in two stages: what lies between the stages is the front end's. `deploy.build` makes such a
file. Like a plan it is code, and its hash is what the manifest checks. Builds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tracker.errors import EngineError
from tracker.manifest import Manifest
from tracker.runtimes.container import Container, Pieces, begins_with
from tracker.runtimes.tensorrt import REBUILD, TensorRTRuntime, read_engine

MAGIC = b"trkprt1\n"


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
        content = read_engine(path, manifest)
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
    return begins_with(path, MAGIC)


def pack(plans: Mapping[str, bytes]) -> bytes:
    """The file's content, of plans by input; see `container`."""
    pieces = Pieces()
    return pieces.packed(MAGIC, {name: pieces.add(plan) for name, plan in plans.items()})


def unpack(content: bytes, name: str) -> dict[str, bytes]:
    """What `pack` put there. name: of the file, for messages.

    Raises EngineError for what is no such file, is cut short or says what cannot be.
    """
    try:
        container = Container(content, MAGIC)
        plans = {str(part): bytes(container.piece(place)) for part, place in container.index.items()}
        if not plans or not all(plans.values()):
            raise ValueError("it has no plans, or empty ones")
        return plans
    except (ValueError, TypeError, AttributeError) as error:  # the last two of another JSON
        raise EngineError(
            f"{name} is no engine in parts or is cut short ({error}): copy it again, or {REBUILD}"
        ) from error
