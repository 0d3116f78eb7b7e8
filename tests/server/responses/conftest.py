"""The scripted model of tests/server/dialogue, for this API."""

from tests.server.dialogue.conftest import speak

__all__ = ["speak"]
