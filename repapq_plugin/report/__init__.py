"""What a person reads about a quantization."""
