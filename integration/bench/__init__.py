"""Accuracy runs that are too slow for a test suite; each writes its figures beside the command that made them."""
