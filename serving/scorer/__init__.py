"""The scorer: answers requests with the champion's scores, without torch.

`service.py` holds one process together; `score.py`, `open_inference.py` and `repository.py` are
what it answers. `champion.py` is one loaded model, `tables.py` where a user's history comes from.
`following.py` finds out which model is to be served, `swapping.py` brings it into use.
"""
