"""Scripts that made the shipped items and reference checkpoints."""
