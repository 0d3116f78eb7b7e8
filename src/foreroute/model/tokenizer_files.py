"""Check a tokenizer's files before transformers reads them, as it ignores some faults."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foreroute.errors import CorruptCheckpointError, PromptError, named
from foreroute.whole_files import check_no_pointer, read_object, read_text

_OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_VOCABULARIES = ("*.model", "*.tiktoken", "*.spm", "vocab.txt", "merges.txt", "tekken.json")
_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
_MOST_TEMPLATE_CHARS = 2**18


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` has a file that a tokenizer could be made of."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")) or any(
        next(folder.glob(pattern), None) for pattern in _VOCABULARIES
    )


def check_tokenizer_files(folder: Path) -> None:
    """Check that every tokenizer file in `folder` is complete, as far as a file by itself can tell.

    Raises:
        CorruptCheckpointError: one is cut off, a git-LFS pointer, no JSON object, or a chat template that does not
            parse; named.
    """
    settings: dict[str, Any] = {}
    for name in _OBJECTS:
        if (folder / name).is_file():
            found = read_object(folder / name)
            settings = found if name == "tokenizer_config.json" else settings
    for path in _matching(folder, _VOCABULARIES):
        check_no_pointer(path)
    for path in _matching(folder, _TEMPLATES):
        text = read_text(path)
        if not text.strip():
            raise CorruptCheckpointError(f"{path} is empty: a chat template was cut off. Download it again.")
        check_template(text, str(path))
    for name, template in _templates_in(settings, folder / "tokenizer_config.json"):
        check_template(template, f"{folder / 'tokenizer_config.json'}: chat_template{name}")


def check_vocabulary(path: Path) -> None:
    """Check that a tokenizer.json, if it exists, is a tokenizer's. Cost: reads it, up to a second for a large one.

    Raises:
        CorruptCheckpointError: it is not.
    """
    from tokenizers import Tokenizer

    if path.is_file():
        with named(f"{path} is not a readable tokenizer", advice="Download it again."):
            Tokenizer.from_file(str(path))


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(path for path in folder.glob(pattern) if path.is_file())


def _templates_in(settings: dict[str, Any], path: Path) -> Iterator[tuple[str, str]]:
    """The chat templates in tokenizer_config.json, each with a name for messages."""
    found = settings.get("chat_template")
    if isinstance(found, str):
        yield "", found
    elif isinstance(found, list):
        for at, one in enumerate(found):
            if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("name", "template")):
                raise CorruptCheckpointError(f"{path}: chat_template[{at}] has no name or no template.")
            yield f" {one['name']!r}", one["template"]
    elif isinstance(found, dict):
        for name, one in found.items():
            if not isinstance(one, str):
                raise CorruptCheckpointError(f"{path}: chat_template {name!r} is {one!r:.40}, not a text.")
            yield f" {name!r}", one
    elif found is not None:
        raise CorruptCheckpointError(f"{path}: chat_template is {found!r:.40}, not a text.")


def check_template(text: str, source: str) -> None:
    """Check that the chat template `text` of `source` can be parsed. Nothing in it is run or constant-folded.

    Raises:
        CorruptCheckpointError: it cannot: a block is open at its end, for example, as in a truncated file.
    """
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    class Generation(Extension):
        """transformers' own block around the model's answer."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    if len(text) > _MOST_TEMPLATE_CHARS:
        raise CorruptCheckpointError(f"{source} has {len(text):,} characters; no chat template is as long.")
    with named(f"{source} is not a chat template that can be parsed", advice="Download it again."):
        Environment(extensions=[loopcontrols, Generation]).parse(text)


def default_template(tokenizer: Any) -> str | None:
    """The chat template used when none is named; None where the tokenizer has no template.

    Raises:
        PromptError: it has several, and none is the default.
    """
    found = getattr(tokenizer, "chat_template", None)
    if not isinstance(found, dict):
        return found or None
    if not found:
        return None
    if "default" not in found:
        raise PromptError(
            f"The tokenizer has the chat templates {', '.join(sorted(map(str, found)))} and no default. Rename the one "
            'to be used to "default" in tokenizer_config.json; generate --no-chat leaves templates out.'
        )
    return str(found["default"])
