"""Training, the compiled steps, and the checkpoints from which it goes on.

`fitting` is where `fit` begins, `loop` where `evaluate` and `predict` do.
"""
