"""The settings shared by the guide's four small regression models."""

import ml_collections
from ml_collections import config_dict


def default_config(*, epochs: int) -> ml_collections.ConfigDict:
    """Returns the settings of a regression on rows of 32 numbers, in batches of 32."""
    config = ml_collections.ConfigDict()
    config.dataset = "regression"
    config.batch_size = 32
    config.epochs = epochs
    config.steps_per_epoch = config_dict.placeholder(int)
    config.learning_rate = 0.001
    config.seed = 1337
    return config
