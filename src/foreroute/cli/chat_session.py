"""A chat so far: its turns and settings, how it becomes a prompt, and the file it is saved in."""

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli.options import at_least, between
from foreroute.errors import PromptError
from foreroute.whole_files import atomic_write, check_no_pointer

if TYPE_CHECKING:
    import torch

_FORMAT, _VERSION = "foreroute-chat", 1
_ROLES = ("user", "assistant")

Setting = str | int | float | None


# Settings of `/set`: how a value is parsed, and what the setting does.
SETTINGS: dict[str, tuple[Callable[[str], Setting], str]] = {
    "temperature": (between(0, 100), "higher is more random; 0 takes the likeliest token"),
    "top_k": (at_least(1), "sample from the N likeliest tokens"),
    "top_p": (between(0, 1, open_below=True), "sample from the likeliest tokens that have this probability together"),
    "min_p": (between(0, 1), "leave out tokens below X times the likeliest one's probability"),
    "repetition_penalty": (between(1e-3, 100), "above 1: tokens seen before become less likely"),
    "max_new_tokens": (at_least(1), "longest answer, in tokens"),
    "seed": (at_least(0), "the same seed samples the same tokens, from the next answer on"),
    "policy": (str, "how misses are treated: exact, tolerance:0.1, speculative, paper"),
}


def read_setting(name: str, text: str) -> Setting:
    """Parse `text` as a value of the setting `name`; None, the model's own value, for "default".

    Raises:
        PromptError: there is no such setting, or it does not take this value.
    """
    if name not in SETTINGS:
        raise PromptError(f"There is no setting {name!r}. There are: {', '.join(SETTINGS)}.")
    if text == "default":
        return None
    try:
        return SETTINGS[name][0](text)
    except ValueError:
        raise PromptError(f"{name} is to be a number, not {text!r}.") from None
    except ArgumentTypeError as error:
        raise PromptError(f"{name}: {error}.") from None


@dataclass
class Conversation:
    """The turns so far, and the settings for the next answer.

    Attributes:
        messages: {"role": "user" or "assistant", "content": text}, the oldest first.
        system: the chat's system message, where there is one.
        settings: those of SETTINGS that differ from the model's own.
        first: messages before it are left out of prompts, as the context has no room for them; not saved.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    system: str | None = None
    settings: dict[str, Setting] = field(default_factory=dict)
    first: int = 0

    def set(self, name: str, value: Setting) -> None:
        """Set the setting `name` to `value`; None restores the model's own."""
        if value is None:
            self.settings.pop(name, None)
        else:
            self.settings[name] = value

    def say(self, role: str, content: str) -> None:
        """Add a turn of `role` ("user" or "assistant") with this content."""
        self.messages.append({"role": role, "content": content})

    def drop_oldest(self) -> bool:
        """Leave the oldest question and its answer out of prompts; False where only the last question is left."""
        questions = [at for at, turn in enumerate(self.messages) if turn["role"] == "user" and at > self.first]
        if not questions:
            return False
        self.first = questions[0]
        return True

    def take_back(self) -> str | None:
        """Remove the last question and what was said after it; return the question, None where there is none."""
        questions = [at for at, turn in enumerate(self.messages) if turn["role"] == "user"]
        if not questions:
            return None
        question = self.messages[questions[-1]]["content"]
        del self.messages[questions[-1] :]
        self.first = min(self.first, len(self.messages))
        return question

    def prompt_ids(self, tokenizer: Any, *, is_plain: bool) -> "torch.Tensor":
        """Turn the whole chat into tokens [1, tokens] with `tokenizer`, ready for the next answer.

        Args:
            is_plain: use no template: the turns are one text, a line each, and the model continues it.
        Raises:
            PromptError: the model's template refuses these messages.
        """
        if is_plain:
            kept = self.messages[self.first :]
            text = "".join(turn["content"] + ("\n" if turn["role"] == "user" else "") for turn in kept)
            ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
            return ids.long()
        from foreroute.model.text import chat_ids

        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return chat_ids(tokenizer, first + self.messages[self.first :])

    # Saving and loading.

    def save(self, path: Path, model: str) -> None:
        """Write the chat, and the name of its model, to `path` as JSON; overwrite only another saved chat.

        Raises:
            PromptError: the file is something else, or cannot be written.
        """
        if path.exists():
            _read(path)
        whole = {
            "format": _FORMAT, "version": _VERSION, "model": model,
            "system": self.system, "settings": self.settings, "messages": self.messages,
        }  # fmt: skip
        try:
            with atomic_write(path) as beside:
                beside.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise PromptError(f"{path} cannot be written: {error.strerror}.") from error

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read a chat from a file that `save` wrote.

        Raises:
            PromptError: it cannot be read, or is not a saved chat; the message says what is wrong.
        """
        whole = _read(path)
        messages, system, settings = whole.get("messages"), whole.get("system"), whole.get("settings", {})
        if not isinstance(messages, list) or not isinstance(settings, dict):
            raise PromptError(f"{path} is damaged: it has no list of messages, or no settings.")
        if not (system is None or isinstance(system, str)):
            raise PromptError(f"{path} is damaged: its system message is not text.")
        for at, turn in enumerate(messages):
            is_turn = isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str)
            if not is_turn:
                raise PromptError(f"{path} is damaged: message {at + 1} has no role (user, assistant) or no content.")
        read = {name: read_setting(name, str(value)) for name, value in settings.items()}
        return cls([{"role": turn["role"], "content": turn["content"]} for turn in messages], system, read)


def _read(path: Path) -> dict[str, Any]:
    check_no_pointer(path, PromptError)
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError):
        raise PromptError(f"{path} is not a saved chat: it is not JSON. Choose another name.") from None
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        raise PromptError(f"{path} is JSON, but not a saved chat. Choose another name.")
    if whole.get("version") != _VERSION:
        raise PromptError(f"{path} was written by another version of foreroute ({whole.get('version')!r}).")
    return whole
