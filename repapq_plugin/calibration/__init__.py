"""Across-block calibration: units, stages, replay, reconstruction, result."""
