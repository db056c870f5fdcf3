"""Parts of `experiments/tabular.py`: data, splits, models, runs, and what is made of results."""
