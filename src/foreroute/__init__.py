"""foreroute runs Mixture-of-Experts models whose experts do not fit the fast memory.

with foreroute.load("path/or/hub-id", memory="8GiB") as model:   # an ordinary transformers model, experts offloaded
    tokenizer = model.foreroute.tokenizer()
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from foreroute.config import EngineConfig, Plan
from foreroute.errors import ForerouteError

if TYPE_CHECKING:
    from foreroute.loading.load import load

# OpenMP's idle threads spin, by default, on the core that the thread which reads experts is waiting for: a token took
# half as long again (docs/LOG.md, 2026-11-25). A short spin keeps products close together quick. Its library reads
# this when torch is first imported, so that later it would say nothing; what the user has set stays.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
__all__ = ["EngineConfig", "ForerouteError", "Plan", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only those who load a model pay for them.
    if name == "load":
        from foreroute.loading.load import load

        return load
    raise AttributeError(f"module 'foreroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names for completion, `load` among them, which is imported when it is used."""
    return sorted({*globals(), *__all__})
