"""The epoch loop and the compiled steps.

`loop` is where `fit`, `evaluate` and `predict` begin.
"""
