"""What the trackers' settings have in common: fractions stay fractions, and low stays below high."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tracker.errors import ConfigError


def check_settings(config: Any) -> None:
    """Raise ConfigError for a value of another kind than the field's default, a fraction outside 0…1, a
    negative count, or low above high. A fraction may be written as a whole number, 0 or 1.
    """
    for field in fields(config):
        value: Any = getattr(config, field.name)
        kind: type[Any] = type(field.default)
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | kind):
            raise ConfigError(f"{field.name} must be of kind {kind.__name__}, got {value!r}")
        if kind is float and not 0.0 <= value <= 1.0:
            raise ConfigError(f"{field.name} must lie in 0…1, got {value}")
        if kind is int and value < 0:
            raise ConfigError(f"{field.name} must not be negative, got {value}")
    if config.low > config.high:
        raise ConfigError(f"low must not exceed high, got low={config.low} and high={config.high}")
