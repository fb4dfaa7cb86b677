"""What a tool found, as a JSON file for programs."""

from __future__ import annotations

import json
from pathlib import Path

from tracker.errors import SinkError


def write_json(path: Path, content: object) -> None:
    """Raises SinkError, in the words of tools' option --json, where the file cannot be written."""
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SinkError(f"cannot write {path}: {error.strerror}; choose another place with --json") from error
