"""The BSE service: keeps each user's table up to date from an event log, away from the scorer.

Behaviour Sequence Encoding is what the SDIM paper calls it (arXiv 2205.10249, section 4.3).
`python -m hashtab.serving.bse --help` says how to run it.
"""
