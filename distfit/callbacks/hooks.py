"""The hooks of callbacks that are called for batches."""

import keras

BATCH_HOOKS = {
    "train": ("on_train_batch_begin", "on_train_batch_end"),
    "test": ("on_test_batch_begin", "on_test_batch_end"),
    "predict": ("on_predict_batch_begin", "on_predict_batch_end"),
}


def listens(callback: keras.callbacks.Callback, hook: str) -> bool:
    """Whether a callback does something in a batch hook.

    Keras's `on_train_batch_*` call `on_batch_*`, which may be what is overridden.
    """
    names = {hook, hook.replace("_train", "")} & set(vars(keras.callbacks.Callback))
    return any(_is_overridden(callback, name) for name in names)


def _is_overridden(callback: keras.callbacks.Callback, name: str) -> bool:
    method = getattr(callback, name)
    function = getattr(method, "__func__", method)
    return function is not getattr(keras.callbacks.Callback, name)
