"""Merging blocks of any class: what is affine and shift-invariant is a convolution. See the README beside this file."""
