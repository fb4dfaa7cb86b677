"""What the trackers' settings have in common: fractions stay fractions, and low stays below high."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tracker.errors import ConfigError


def check_settings(config: Any) -> None:
    """Raise ConfigError for a float outside 0…1, a negative int, or low above high."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            continue
        if isinstance(value, float) and not 0.0 <= value <= 1.0:
            raise ConfigError(f"{field.name} must lie in 0…1, got {value}")
        if isinstance(value, int) and value < 0:
            raise ConfigError(f"{field.name} must not be negative, got {value}")
    if config.low > config.high:
        raise ConfigError(f"low must not exceed high, got low={config.low} and high={config.high}")
