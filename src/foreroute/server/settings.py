"""What the server was told when it was started: names, limits, keys, defaults."""

import ipaddress
import re
from dataclasses import dataclass

from foreroute.errors import ServerError

_NAME = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?")
_PORT = re.compile(r"(?<=[^:]):[0-9]{1,5}\Z")
# A browser leaves them out of Origin.
_USUAL_PORTS = (80, 443)
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused before any work is done.

    in_flight: requests at once, each of which may hold a body of body_bytes.
    template_s and template_chars bound the rendering of a chat template; head_s is how long a request's first lines may
    take to arrive, body_s its body, send_s how long a client may leave what was sent to it unread.
    """

    in_flight: int = 256
    body_bytes: int = 8 * 2**20
    head_s: float = 30.0
    body_s: float = 30.0
    send_s: float = 60.0
    json_depth: int = 32
    messages: int = 4096
    prompts: int = 128
    choices: int = 16
    stop: int = 4
    stop_chars: int = 256
    logit_bias: int = 1024
    template_s: float = 5.0
    template_bytes: int = 512 * 2**20
    template_chars: int = 8 * 2**20


@dataclass(frozen=True)
class ServerSettings:
    """How to serve.

    Args:
        served_names: what /v1/models lists; a request may name any of them. The first one answers.
        host: the address that is listened on. port: 0 lets the system choose.
        api_keys: a request must bring one of them; none are asked for when there are none.
        allowed_hosts: further names that clients know this server by, perhaps with a port; see `hosts` and `host_name`.
        temperature, seed: used where a request has none; None leaves the model's own settings, and chance.
        keep_alive_s: after so long without an event a stream sends a comment.
        retry_after_s: what 429 and 503 tell the client to wait.
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
    retry_after_s: int = 1
    allow_pages: bool = True
    limits: Limits = Limits()

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that the Host header may have; None: any, on an address that others reach and where none are named."""
        if not self.allowed_hosts and not is_loopback(self.host):
            return None
        own = self.host.strip("[]").lower()
        named = {_PORT.sub("", name) for name in self.allowed_hosts}
        return LOCAL_NAMES | {f"[{own}]" if ":" in own else own} | named


def host_name(text: str) -> str:
    """A name as the Origin header has it after http://: in lower case, an IPv6 address in brackets, perhaps a port.

    Raises:
        ServerError: it is no name of a host (a URL, a pattern), or its port is none.
    """
    found = _PORT.search(text)
    # Without brackets, what looks like a port is the end of an address.
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
            f"{text!r} is no name of a host. Give it without http:// and path, as in llm.example.org or "
            "llm.example.org:8443."
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_keys: tuple[str, ...], *, is_insecure: bool) -> None:
    """Refuse to be reachable by others without a key.

    Raises:
        ServerError: the address is not a loopback one, there is no key, and nobody said --insecure; or a key
            is one that cannot be sent.
    """
    for key in api_keys:
        if not key or not key.isascii() or any(char.isspace() or not char.isprintable() for char in key):
            raise ServerError("An API key must be printable ASCII without spaces, and not empty.")
    if not is_loopback(host) and not api_keys and not is_insecure:
        raise ServerError(
            f"--host {host} can be reached by other machines. Give --api-key (or FOREROUTE_API_KEY), or say --insecure."
        )
