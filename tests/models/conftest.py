"""Without a GPU Triton kernels run interpreted, on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    # Triton looks at this when it is imported, which is when its first kernel is needed.
    os.environ.setdefault("TRITON_INTERPRET", "1")
