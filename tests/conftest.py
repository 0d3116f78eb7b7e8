"""What all tests share: tiny checkpoints and transformers' own models of them, made once per session."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.checkpoints import Checkpoints
    from tests.support.runs import References

# Nothing here may reach for the network; read by huggingface_hub when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit it; the tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def _torch_setup() -> None:
    import torch
    from transformers.utils import logging

    # One thread: tiny products gain nothing from more, and two OpenMP teams on a busy machine cost seconds.
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="session")
def checkpoints(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> "Checkpoints":
    """Tiny checkpoints by family and dtype. Copy one before changing it."""
    from tests.support.checkpoints import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def references(_torch_setup: None) -> "References":
    """transformers' resident models of those checkpoints, and what they generate."""
    from tests.support.runs import References

    return References()


@pytest.fixture
def load(_torch_setup: None) -> Iterator[Callable[..., Any]]:
    """`foreroute.load(folder, memory=..., **EngineConfig fields)`; what it loaded is closed after the test."""
    from dataclasses import fields

    import foreroute

    names = {option.name for option in fields(foreroute.EngineConfig)} - {"memory"}
    opened: list[Any] = []

    def loading(folder: Path, memory: int | str | None = "25%", **options: Any) -> Any:
        switches = {name: options.pop(name) for name in list(options) if name in names}
        model = foreroute.load(folder, memory, config=foreroute.EngineConfig(**switches), **options)
        opened.append(model)
        return model

    yield loading
    for model in opened:
        model.foreroute.close()
