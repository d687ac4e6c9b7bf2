"""RepAPQ itself: QPR, across-block calibration, and what they are made of (see README.md beside this file)."""
