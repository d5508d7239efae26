"""Keeps what workers say to each other away from an HTTP proxy.

gRPC, through which TensorFlow connects workers, sends everything to the proxy of the
environment, even what goes to this host; the workers then wait for each other in vain.
"""

from collections.abc import Iterable, Mapping

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
# The first that has a value counts, for gRPC; other programs look at the second alone.
_EXEMPT, _COMMON = "no_grpc_proxy", "no_proxy"


def exemption(environ: Mapping[str, str], hosts: Iterable[str]) -> dict[str, str]:
    """Returns the variables by which gRPC reaches hosts without the proxy.

    Args:
        environ: the environment variables; hosts that they exempt stay so.
        hosts: names and addresses, those of IPv6 without brackets.
    """
    if not any(environ.get(name) for name in _PROXIES):
        return {}
    given = environ.get(_EXEMPT) or environ.get(_COMMON) or ""
    exempt = dict.fromkeys([*given.split(","), *hosts])  # each once, in this order
    return {_EXEMPT: ",".join(filter(None, exempt))}
