"""What looks after a process."""

from typing import NamedTuple

from launch.watchdog.signals import Signals
from launch.watchdog.stall import Watchdog


class Watch(NamedTuple):
    """What looks after this process: its watchdog, and what hears its signals."""

    watchdog: Watchdog
    signals: Signals
    began: float  # when this process began, in seconds of time.time()
