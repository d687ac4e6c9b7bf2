"""Why a network loses by quantization: what its activations hold, and which channels and samples stand out."""
