"""Reference models: programs with steps of their own, one module each.

The models up to `gan` are those of Keras's guide on custom steps, with the same
operations in the same order,
https://keras.io/guides/custom_train_step_in_tensorflow/; the others show what else a
step may do with the global batch. A module's docstring gives the command that runs it,
and the module defines

    get_config() -> ConfigDict              the defaults of every setting that it reads
    build(config) -> distfit.Model          compiled; called in the strategy's scope
    data(config) -> (train, validation)     only if `config.dataset` must be adapted
    callbacks(config, workdir) -> list      only if training needs them
"""

import importlib
from types import ModuleType

NAMES = (
    "custom_step",
    "low_level_step",
    "weighted_step",
    "custom_eval",
    "gan",
    "mnist_cnn",
    "vae",
    "contrastive",
    "wgan_gp",
    "distillation",
    "masked_lm",
)


def get(name: str) -> ModuleType:
    """Imports and returns the module of the reference model `name`, one of `NAMES`."""
    if name not in NAMES:
        raise ValueError(
            f"Unknown reference model; choose one of {', '.join(NAMES)}. "
            f"Received: model={name!r}"
        )
    return importlib.import_module(f"{__name__}.{name}")
