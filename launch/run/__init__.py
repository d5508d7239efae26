"""One worker of a run: its strategy, data and model, and the files it writes.

Start with `worker`.
"""
