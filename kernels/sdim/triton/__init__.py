"""Triton kernels of SDIM for GPUs; imported only when one of them runs."""
