"""Quantizers and the layers that carry them: fake quantize, trace, plan."""
