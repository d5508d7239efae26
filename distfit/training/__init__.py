"""Training, the compiled steps, and the checkpoints from which it goes on.

`fitting` is where `fit` begins, and `training` what it runs; `evaluate` and `predict`
begin in `loop`.
"""
