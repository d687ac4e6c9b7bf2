"""Merging blocks of any class: what is affine and shift-invariant is a convolution (see README.md here)."""
