"""One worker: strategy, data and model, and what it writes.

`worker` is where to begin.
"""
