"""Keeps the traffic between workers off an HTTP proxy.

TensorFlow connects workers by gRPC, which uses the proxy of the environment even for
this host; the workers would then wait for each other forever.
"""

from collections.abc import Iterable, Mapping

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
# gRPC uses the first that has a value; other programs read only the second.
_EXEMPT, _COMMON = "no_grpc_proxy", "no_proxy"


def exemption(environ: Mapping[str, str], hosts: Iterable[str]) -> dict[str, str]:
    """Returns the variables that make gRPC bypass the proxy for hosts.

    Args:
        environ: the environment variables; hosts that they exempt stay exempt.
        hosts: names or IP addresses, IPv6 without brackets.
    """
    if not any(environ.get(name) for name in _PROXIES):
        return {}
    given = environ.get(_EXEMPT) or environ.get(_COMMON) or ""
    exempt = dict.fromkeys([*given.split(","), *hosts])  # no duplicates, in this order
    return {_EXEMPT: ",".join(filter(None, exempt))}
