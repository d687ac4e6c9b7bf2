"""What to install for runtimes that want other packages than the toolboxes do; each text stands in several messages."""

EXECUTORCH = "pip install 'executorch>=1.3.1,<1.4' (for torch 2.12)"
"""Each version of ExecuTorch is built for one of torch, and its runtime refuses others."""

LITERT_TORCH = "pip install 'litert-torch>=0.10,<0.11'"
"""The converter; it brings the interpreter."""

LITERT = "pip install ai-edge-litert"
"""The interpreter alone."""
