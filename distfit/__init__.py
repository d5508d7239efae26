"""Custom `train_step` Keras models on many replicas, with one device's numbers."""

from distfit import callbacks, losses, random
from distfit.collectives import all_gather, global_mean, global_sum
from distfit.model import Model, Sequential
from distfit.strategy import create_strategy, is_chief, wait_for_all
from distfit.verification import verify

__version__ = "0.1.0"

__all__ = [
    "Model",
    "Sequential",
    "all_gather",
    "callbacks",
    "create_strategy",
    "global_mean",
    "global_sum",
    "is_chief",
    "losses",
    "random",
    "verify",
    "wait_for_all",
]
