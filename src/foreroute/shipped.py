"""Find the small trained models that ship, by name: in the installed package, or in the repository beside it."""

from pathlib import Path

# Their folders are in PACKAGE/models, of a checkout in models/ beside src/. Tests replace it.
PACKAGE = Path(__file__).parent


def places() -> tuple[Path, Path]:
    """The folders in which models that ship are looked for, the first one first; they may be absent."""
    return PACKAGE / "models", PACKAGE.parents[1] / "models"


def shipped_models() -> dict[str, Path]:
    """The folders of all models that ship, by name."""
    found: dict[str, Path] = {}
    for place in places():
        for config in sorted(place.glob("*/config.json")):
            found.setdefault(config.parent.name, config.parent)
    return found
