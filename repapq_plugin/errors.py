"""Everything the plugin raises on purpose.

One base class, so that a caller can catch all of it, and a child for each place where a remedy differs.
"""


class RepAPQError(Exception):
    """Base of every error that the plugin raises on purpose."""


class ConfigError(RepAPQError, ValueError):
    """A configuration value is not allowed; the message names the key, the value and what is allowed."""


class MergeError(RepAPQError):
    """The branches of a block cannot be merged into one convolution without changing its result."""


class CalibrationError(RepAPQError):
    """Calibration cannot go on: no data, nothing to quantize, or activations that are not finite."""


class ResultError(RepAPQError):
    """A saved result cannot be read, or does not belong to the model it is loaded into."""


class CheckpointError(RepAPQError):
    """A checkpoint folder cannot be used, is used by another process, or holds another calibration."""


class RankError(RepAPQError):
    """Another process of the same calibration has ended or failed; the message says which."""


class ExportError(RepAPQError):
    """A quantized model cannot be written for a runtime, or what was written failed its check."""


class HostError(RepAPQError):
    """A host toolbox is missing, is too old, or handed over something that the plugin cannot use."""
