"""What the trackers' settings have in common: fractions stay fractions, and low stays below high."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tracker.association.lifecycle import TrackTable, buffer_frames
from tracker.errors import ConfigError

# What overlaps: boxes, or where they touch several others also masks.
COSTS = ("box", "mask")


def check_settings(config: Any) -> None:
    """Raise ConfigError for a value of another kind than the field's default, a fraction outside 0…1, a
    negative count, a cost there is not, or low above high. A fraction may be written as a whole number.
    """
    for field in fields(config):
        value: Any = getattr(config, field.name)
        kind: type[Any] = type(field.default)
        whole_too = int if kind is float else kind
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (kind, whole_too)):
            raise ConfigError(f"{field.name} must be of kind {kind.__name__}, got {value!r}")
        if kind is float and not 0.0 <= value <= 1.0:
            raise ConfigError(f"{field.name} must lie in 0…1, got {value}")
        if kind is int and value < 0:
            raise ConfigError(f"{field.name} must not be negative, got {value}")
    if config.cost not in COSTS:
        raise ConfigError(f"cost must be one of {', '.join(COSTS)}, got {config.cost!r}")
    if config.cost == "mask" and config.official:
        raise ConfigError("the published trackers compare boxes, not masks: leave out compat, or cost mask")
    if config.low > config.high:
        raise ConfigError(f"low must not exceed high, got low={config.low} and high={config.high}")


def table_for(config: Any, *, frame_rate: float, names: tuple[str, ...]) -> TrackTable:
    """An empty table as the settings want it. Raises ConfigError for a frame rate that cannot be."""
    silhouettes = None
    if config.cost == "mask":
        # Torch loads here: who compares boxes does without.
        from tracker.association.silhouettes import Silhouettes

        silhouettes = Silhouettes()
    return TrackTable(
        buffer=buffer_frames(frame_rate, config.track_buffer),
        outage=buffer_frames(frame_rate, config.outage_buffer),
        official=config.official,
        names=names,
        silhouettes=silhouettes,
    )
