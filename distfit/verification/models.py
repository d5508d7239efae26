"""Any `keras.Model` as a `distfit.Model`, as if its class derived from it."""

import keras

from distfit import model as model_module


def as_distfit_model(model: keras.Model) -> "model_module.Model":
    """Gives a model the behaviour of `distfit.Model`, in place.

    Its class becomes one of the same name that has `distfit.Model` among its bases, and
    losses and optimizers get their global-batch form.
    """
    if isinstance(model, model_module.Model):
        return model
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls, model_module.Model), {})
    for name, value in list(vars(model).items()):
        adapted = model_module.adapted(value)
        if adapted is not value:
            setattr(model, name, adapted)
    return model
