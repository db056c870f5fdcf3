"""Parts of the benchmark of hash-sampled and exact attention on a GPU; bench_sdim.py runs it."""
