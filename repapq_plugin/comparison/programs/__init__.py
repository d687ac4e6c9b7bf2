"""What runs in a peer's own environment: each file stands alone there and imports nothing of this package."""
