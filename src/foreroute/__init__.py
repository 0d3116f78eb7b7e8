"""foreroute runs Mixture-of-Experts models whose experts do not fit the fast memory.

model = foreroute.load("path/or/hub-id", memory="8GiB")   # an ordinary transformers model, experts offloaded
"""

from typing import TYPE_CHECKING, Any

from foreroute.config import EngineConfig, Plan
from foreroute.errors import ForerouteError

if TYPE_CHECKING:
    from foreroute.engine.loader import load

__version__ = "0.1.0"
__all__ = ["EngineConfig", "ForerouteError", "Plan", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only those who load a model pay for them.
    if name == "load":
        from foreroute.engine.loader import load

        return load
    raise AttributeError(f"module 'foreroute' has no attribute {name!r}")
