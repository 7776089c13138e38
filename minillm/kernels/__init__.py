"""Attention by blocks, by Triton and by other people's kernels, and matrix products: where a student need not read.

A kernel takes tensors and says how they are multiplied; which one is taken, and why, is decided in chapter 12.
"""
