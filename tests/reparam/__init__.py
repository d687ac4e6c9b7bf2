"""Reparameterization: families, fusing, folding, unknown blocks."""
