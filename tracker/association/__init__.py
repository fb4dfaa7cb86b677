"""From one frame's detections to tracks: the two trackers, their settings, and how to choose one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from tracker.association.byte import Byte, ByteConfig
from tracker.association.jde import Jde, JdeConfig
from tracker.association.settings import COSTS
from tracker.errors import ConfigError
from tracker.types import Association

__all__ = ["COSTS", "Byte", "ByteConfig", "Jde", "JdeConfig", "make_association"]

_PRESETS: dict[tuple[str, str | None], Callable[[], JdeConfig | ByteConfig]] = {
    ("jde", None): JdeConfig,
    ("jde", "fairmot"): JdeConfig.fairmot,
    ("byte", None): ByteConfig,
    ("byte", "bytetrack"): ByteConfig.bytetrack,
}


def make_association(
    tracker: str,
    *,
    compat: str | None = None,
    frame_rate: float = 30.0,
    names: tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
) -> Association:
    """A tracker by name, "jde" or "byte"; compat "fairmot" (jde) or "bytetrack" (byte) for the published one.

    settings: fields of JdeConfig or ByteConfig that shall differ from the defaults.
    Raises ConfigError for a name, a pair of names or a setting that does not exist.
    """
    preset = _PRESETS.get((tracker, compat))
    if preset is None:
        offered = ", ".join(name if not also else f"{name} with {also}" for name, also in _PRESETS)
        raise ConfigError(f"no tracker {tracker!r} with compat {compat!r}: there is {offered}")
    config = preset()
    known = {field.name for field in fields(config)} - {"official"}
    for name in settings or {}:
        if name not in known:
            raise ConfigError(f"{tracker} has no setting {name!r}: it has {', '.join(sorted(known))}")
    config = replace(config, **(settings or {}))
    if isinstance(config, JdeConfig):
        return Jde(config, frame_rate=frame_rate, names=names)
    return Byte(config, frame_rate=frame_rate, names=names)
