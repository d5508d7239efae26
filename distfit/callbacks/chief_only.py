"""A callback that runs on the chief only."""

import functools

import keras

from distfit.callbacks.hooks import BATCH_HOOKS, listens
from distfit.cluster import workers
from distfit.cluster.workers import Workers


class ChiefOnly(keras.callbacks.Callback):
    """Runs another callback on the chief only, for writing or reporting.

    On several workers that callback must not call anything that takes all of them:
    `evaluate()`, `predict()`, `fit()` and their `*_on_batch` forms raise an error in
    it. Saving a model works, but saves only the chief's part of metrics and of
    accumulated gradients. The random generators of Python, NumPy and TensorFlow are
    restored after it. Hooks for batches cost an exchange after every execution, which
    reads the logs.

    Args:
        callback: The callback.
    """

    def __init__(self, callback: keras.callbacks.Callback):
        super().__init__()
        self.callback = callback
        self._team: Workers | None = None
        for name in _hooks_of(callback):
            setattr(self, name, functools.partial(self._call, name))

    def set_params(self, params):
        super().set_params(params)
        self.callback.set_params(params)

    def set_model(self, model):
        super().set_model(model)
        self._team = workers.of(model.distribute_strategy)
        if self._team.is_chief:
            self.callback.set_model(model)

    def _call(self, name: str, *args, **kwargs) -> None:
        if self._team is None or self._team.count == 1:
            getattr(self.callback, name)(*args, **kwargs)
        elif self._team.is_chief:
            with workers.alone(self.model.distribute_strategy):
                getattr(self.callback, name)(*args, **kwargs)


def _hooks_of(callback: keras.callbacks.Callback) -> list[str]:
    """The names of the hooks that a callback implements."""
    names = [n for n in vars(keras.callbacks.Callback) if n.startswith("on_")]
    batch_hooks = [hook for hooks in BATCH_HOOKS.values() for hook in hooks]
    # Keras's `on_train_batch_*` call the older two.
    others = {*batch_hooks, "on_batch_begin", "on_batch_end"}
    listened = [hook for hook in batch_hooks if listens(callback, hook)]
    return [n for n in names if n not in others] + listened
