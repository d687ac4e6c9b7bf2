"""RepAPQ."""
