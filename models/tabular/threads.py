"""How many threads torch computes with, for a while."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads(n_jobs: int | None) -> Iterator[None]:
    """Compute with that many threads; None is 1, as in scikit-learn, and -1 all cores."""
    n_jobs = 1 if n_jobs is None else n_jobs
    if n_jobs == 0:
        raise ValueError("n_jobs must be a number of threads, -1 for all cores or None, got 0")
    before = torch.get_num_threads()
    cores = os.cpu_count() or 1
    torch.set_num_threads(n_jobs if n_jobs > 0 else max(1, cores + 1 + n_jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)
