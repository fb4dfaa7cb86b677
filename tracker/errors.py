"""Every error this package raises on purpose, in one tree.

    TrackerError              what the command line turns into one line and exit code 1
    ├── ConfigError           an option, a configuration file or a manifest says something impossible
    ├── SourceError           a video, directory or stream cannot be opened or read
    ├── EngineError           an engine cannot be loaded or does not fit its front end
    ├── CheckpointError       weights cannot be loaded or belong to another network
    ├── DetectionsError       numbers that no tracker may accept: NaN, inf, wrong shapes
    └── SinkError             results cannot be written

A message names the value, the limit it broke and the remedy; the reader should not need the traceback.
"""


class TrackerError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(TrackerError):
    """An option, configuration file or manifest that cannot be used."""


class SourceError(TrackerError):
    """A source that cannot be opened or read."""


class EngineError(TrackerError):
    """An engine that cannot be loaded, or does not fit its front end."""


class DeviceError(EngineError):
    """A GPU that failed in mid-work or is gone: nothing on it can be used again by this process."""


class CheckpointError(TrackerError):
    """Weights that cannot be loaded, or that belong to another network."""


class DetectionsError(TrackerError):
    """Detections with wrong shapes, or with NaN or inf among their numbers."""


class SinkError(TrackerError):
    """Results that cannot be written."""
