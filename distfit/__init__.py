"""Custom `train_step` Keras models on many replicas, with one device's numbers."""

from distfit import callbacks
from distfit.model import Model, Sequential, evaluate, fit, predict
from distfit.strategy import create_strategy, is_chief, wait_for_all
from distfit.training.resuming import load_weights
from distfit.verification import verify

__version__ = "0.1.0"

__all__ = [
    "Model",
    "Sequential",
    "callbacks",
    "create_strategy",
    "evaluate",
    "fit",
    "is_chief",
    "load_weights",
    "predict",
    "verify",
    "wait_for_all",
]
