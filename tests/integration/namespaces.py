"""Two hosts on one machine: network namespaces, with a link that nobody else can reach.

The link is a pair of virtual Ethernet devices or, to delay every packet, two TUN
devices and a thread that forwards packets late. That needs no kernel module except
`tun`; `tc netem`, the usual way, is not in every kernel.
"""

import collections
import contextlib
import fcntl
import os
import pathlib
import secrets
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x1001


class Hosts:
    """Two network namespaces. `command(i, ...)` is a command that runs in one."""

    def __init__(self) -> None:
        unique = secrets.token_hex(4)
        self.names = [f"distfit-{unique}-{i}" for i in range(2)]

    def command(self, index: int, *command: str) -> list[str]:
        # It replaces itself by the program, so the process id is that of the program.
        return ["ip", "netns", "exec", self.names[index], *command]

    def cut(self) -> None:
        """Cuts the link: packets are dropped without an error."""
        for name in self.names:
            _ip("-n", name, "link", "set", "link0", "down")

    def mend(self) -> None:
        """Undoes a cut."""
        for name in self.names:
            _ip("-n", name, "link", "set", "link0", "up")


@contextlib.contextmanager
def hosts(delay: float = 0.0) -> Iterator[Hosts]:
    """Yields two hosts; a packet from one to the other takes `delay` seconds."""
    _skip_where_not_possible(delay)
    made = Hosts()
    try:
        for name in made.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        with _late_link(made, delay) if delay else _link(made):
            yield made
    finally:
        for name in made.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _skip_where_not_possible(delay: float) -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need `ip`, of Debian's package iproute2")
    if delay and not pathlib.Path("/dev/net/tun").exists():
        pytest.skip("a slow link needs /dev/net/tun")
    name = f"distfit-{secrets.token_hex(4)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no network namespace can be made here: {tried.stderr.strip()}")
    _ip("netns", "delete", name)


@contextlib.contextmanager
def _link(made: Hosts) -> Iterator[None]:
    first, second = made.names
    ends = ("link0", "netns", first, "type", "veth", "peer", "link0", "netns", second)
    _ip("link", "add", *ends)
    for name, address in zip(made.names, ADDRESSES, strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "link0")
        _ip("-n", name, "link", "set", "link0", "up")
    yield  # The devices end with their namespaces.


@contextlib.contextmanager
def _late_link(made: Hosts, delay: float) -> Iterator[None]:
    ends = [_tun(name, f"tun{name[8:14]}{i}") for i, name in enumerate(made.names)]
    for name, address in zip(made.names, ADDRESSES, strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "link0")
        _ip("-n", name, "link", "set", "link0", "up")
    done = threading.Event()
    thread = threading.Thread(target=_pass_on, args=(ends, delay, done))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for end in ends:
            os.close(end)


def _tun(namespace: str, name: str) -> int:
    """Makes a TUN device in a namespace and returns our end of it."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    _ip("link", "set", name, "netns", namespace)
    _ip("-n", namespace, "link", "set", name, "name", "link0")
    return end


def _pass_on(ends: list[int], delay: float, done: threading.Event) -> None:
    """Forwards packets between the ends, each `delay` seconds after it came."""
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while not done.is_set():
        due = waiting[0][0] - time.monotonic() if waiting else 0.1
        for end in select.select(ends, [], [], min(max(due, 0), 0.1))[0]:
            other = ends[1 - ends.index(end)]
            waiting.append((time.monotonic() + delay, other, os.read(end, 65536)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # the link is down
                os.write(end, packet)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
