"""Callbacks, and Keras's list of them, where unused hooks cost nothing.

Begin with `callback_list`.
"""

from distfit.callbacks.callback_list import CallbackList
from distfit.callbacks.checkpoint import Checkpoint, SaveError
from distfit.callbacks.chief_only import ChiefOnly
from distfit.callbacks.data_wait import DataWait
from distfit.callbacks.lazy_logs import LazyLogs
from distfit.callbacks.non_finite import NonFinite
from distfit.callbacks.progress_bar import ProgressBar, SharedProgressBar

__all__ = [
    "CallbackList",
    "Checkpoint",
    "ChiefOnly",
    "DataWait",
    "LazyLogs",
    "NonFinite",
    "ProgressBar",
    "SaveError",
    "SharedProgressBar",
]
