"""Numerics that everything else is made of; no module, no host."""
