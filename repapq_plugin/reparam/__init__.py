"""Reparameterization: which branches a block has, and how they become one convolution.

Importing it teaches the families of `families` (by name only; no host is imported).
"""

from repapq_plugin.reparam import families as _families
from repapq_plugin.reparam.branches import Branch, BranchSpec, branches_of, register_branches
from repapq_plugin.reparam.by_algebra.unknown import find_unknown_multibranch
from repapq_plugin.reparam.fold import Folding, fold_batchnorm, fold_conv_norm_pairs, fold_norms
from repapq_plugin.reparam.merge import MergedBlock, MergeRecord, fuse_branches, merge_branches
from repapq_plugin.reparam.qarepvgg import QARepVGGBlock

__all__ = [
    "Branch",
    "BranchSpec",
    "Folding",
    "MergeRecord",
    "MergedBlock",
    "QARepVGGBlock",
    "branches_of",
    "find_unknown_multibranch",
    "fold_batchnorm",
    "fold_conv_norm_pairs",
    "fold_norms",
    "fuse_branches",
    "merge_branches",
    "register_branches",
]

_families.register_families()
