"""Settings of the server: names, limits, keys, defaults."""

import ipaddress
import re
from dataclasses import dataclass

from foreroute.errors import ServerError

_NAME = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?")
_PORT = re.compile(r"(?<=[^:]):[0-9]{1,5}\Z")
# Default ports, which browsers leave out of Origin.
_USUAL_PORTS = (80, 443)
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class Limits:
    """Limits of one request; more is refused before any work is done.

    in_flight: requests at once, each of which may hold a body of body_bytes.
    template_s and template_chars bound the rendering of a chat template; head_s the arrival of a request's head, body_s
    that of its body, send_s how long sent data may stay unread, idle_s how long a connection is kept between requests
    (longer than clients' pools keep theirs: a request on one that is just being closed fails), and idle_connections how
    many are kept so: beyond that, the one that has been idle longest is closed (`idle_connections_of`).
    """

    in_flight: int = 256
    body_bytes: int = 8 * 2**20
    head_s: float = 30.0
    body_s: float = 30.0
    send_s: float = 60.0
    idle_s: float = 360.0
    idle_connections: int = 512
    json_depth: int = 32
    prompts: int = 128
    choices: int = 16
    stop: int = 4
    stop_sequences: int = 64
    stop_chars: int = 256
    logit_bias: int = 1024
    template_s: float = 5.0
    template_bytes: int = 512 * 2**20
    template_chars: int = 8 * 2**20


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server.

    Args:
        served_names: listed by /v1/models; a request may use any of them; the first is the default.
        host: the address to listen on. port: 0 lets the system choose.
        api_keys: a request must carry one of them; without any, no key is needed.
        allowed_hosts: further names of this server, perhaps with a port; see `hosts` and `host_name`.
        temperature, seed: defaults of requests; None: the model's own settings, and a random seed.
        keep_alive_s: a stream sends a comment after this long without an event.
        allow_pages: whether the page at / may be served.
    """

    served_names: tuple[str, ...] = ("model",)
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: frozenset[str] = frozenset()
    temperature: float | None = None
    seed: int | None = None
    keep_alive_s: float = 15.0
    allow_pages: bool = True
    limits: Limits = Limits()

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names allowed in the Host header; None: any, on an address that others can reach and without names given."""
        if not self.allowed_hosts and not is_loopback(self.host):
            return None
        own = self.host.strip("[]").lower()
        named = {_PORT.sub("", name) for name in self.allowed_hosts}
        return LOCAL_NAMES | {f"[{own}]" if ":" in own else own} | named


# Descriptors for requests in flight, and as many for files of the model, pipes and listening sockets.
_OTHER_DESCRIPTORS = 2 * Limits.in_flight
_LEAST_IDLE, _MOST_IDLE = 16, 4096


def idle_connections_of(descriptors: int | None) -> int:
    """How many idle connections a process keeps that may open so many descriptors; None: any number."""
    if descriptors is None:
        return _MOST_IDLE
    return min(max(descriptors - _OTHER_DESCRIPTORS, _LEAST_IDLE), _MOST_IDLE)


def host_name(text: str) -> str:
    """Parse a name as in the Origin header after http://: lower case, an IPv6 address in brackets, perhaps a port.

    Raises:
        ServerError: it is not a host's name (but a URL or a pattern), or its port is invalid.
    """
    found = _PORT.search(text)
    # Without brackets, what looks like a port is the end of an IPv6 address.
    if found is None or (":" in text[: found.start()] and not text.startswith("[")):
        return _name(text, text)
    port = int(found[0][1:])
    if not 1 <= port <= 65535:
        raise ServerError(f"{text!r}: a port is a number from 1 to 65535.")
    name = _name(text[: found.start()], text)
    return name if port in _USUAL_PORTS else f"{name}:{port}"


def _name(name: str, text: str) -> str:
    name = name.lower()
    if _NAME.fullmatch(name):
        return name
    try:
        return f"[{ipaddress.IPv6Address(name.strip('[]'))}]"
    except ValueError:
        raise ServerError(
            f"{text!r} is not a host name. Give it without http:// and path, as in llm.example.org or "
            "llm.example.org:8443."
        ) from None


def is_loopback(host: str) -> bool:
    """Whether the address is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_keys: tuple[str, ...], *, is_insecure: bool) -> None:
    """Refuse to be reachable by others without a key, unless is_insecure.

    Raises:
        ServerError: `host` is no loopback address, without api_keys or --insecure; or a key cannot be sent.
    """
    for key in api_keys:
        if not key or not key.isascii() or any(char.isspace() or not char.isprintable() for char in key):
            raise ServerError("An API key must be printable ASCII without spaces, and not empty.")
    if not is_loopback(host) and not api_keys and not is_insecure:
        raise ServerError(
            f"--host {host} can be reached by other machines. Give --api-key (or FOREROUTE_API_KEY), or say --insecure."
        )
