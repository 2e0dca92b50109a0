"""Triton kernels of the steps, one file each beside its step; ``dispatch`` says when they run."""
