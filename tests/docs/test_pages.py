"""What the guides and README show runs as it is written and prints what they say; and the site has every page."""

import re
from pathlib import Path

import pytest
import yaml

from foreroute.cli.main import COMMANDS, build_parser
from tests.docs.blocks import REASONS, ROOT, RUN, RUNNABLE, MarkError, blocks_of, missing, reading

DOCS = ROOT / "docs"
# Those that show how something is done; python.md has its own test, with what each block prints.
PAGES = [
    ROOT / "README.md",
    *(DOCS / f"{name}.md" for name in ("install", "quickstart", "troubleshooting", "faq")),
    *sorted((DOCS / "guides").glob("*.md")),
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.timeout(900)  # a dozen processes, each of which imports torch
@pytest.mark.parametrize("page", [page for page in PAGES if "```" in page.read_text(encoding="utf-8")], ids=name_of)
def test_a_pages_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    with reading(tmp_path) as reader:
        for block in blocks:
            if block.how in REASONS:
                continue
            printed = reader.run(block)
            assert not missing(block.told, printed), f"{block.text}\nprinted:\n{printed}"


def test_every_guide_shows_something_that_is_run() -> None:
    for page in (ROOT / "README.md", DOCS / "quickstart.md", *(DOCS / "guides").glob("*.md")):
        assert [block for block in blocks_of(page.read_text(encoding="utf-8")) if block.how == RUN], name_of(page)


@pytest.mark.parametrize("page", [path for path in PAGES if path.parent != ROOT], ids=name_of)
def test_no_command_is_hidden_from_the_test(page: Path) -> None:
    """A command in an indented block would not be run."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.match(r"(    |\t)+(\$ )?(foreroute|pip|python|curl) ", line)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_not_run_has_flags_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsers = next(one for one in build_parser()._actions if one.dest == "command").choices
    for block in blocks_of(text):
        for line in block.text.splitlines() if block.how in REASONS and block.language == "sh" else ():
            words = line.split()
            if words[:1] == ["foreroute"]:
                assert words[1] in COMMANDS
                flags = {flag for action in parsers[words[1]]._actions for flag in action.option_strings}
                assert {word.partition("=")[0] for word in words if word.startswith("--")} <= flags, line


def test_the_site_has_every_page() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    there = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert sorted(pages(site["nav"])) == there
    assert site["strict"] == "true"
    # With --quiet there are no warnings for it to see.
    assert "mkdocs build --strict\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "make docs\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert set(site["validation"]["links"].values()) == {"warn"}
    # Either would load something from elsewhere.
    assert site["theme"]["font"] == "false"
    assert "offline" not in site["plugins"]
    assert "```mermaid" not in "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))


PAGE = """
<!-- run: {mark} -->
```{language}
echo one
```
"""


def test_marks_that_are_known() -> None:
    assert [block.how for block in blocks_of(PAGE.format(mark="no (downloads)", language="sh"))] == ["downloads"]
    assert [block.how for block in blocks_of(PAGE.format(mark="server", language="sh"))] == ["server"]
    assert [block.how for block in blocks_of(PAGE.format(mark="any exit code", language="sh"))] == ["any exit code"]
    assert [block.how for block in blocks_of("```sh\necho one\n```\n")] == [RUN]
    assert blocks_of("```sh\necho one\n```\n\n```text\none\n```\n")[0].told == ("one",)


@pytest.mark.parametrize(
    "page",
    [
        PAGE.format(mark="no", language="sh"),
        PAGE.format(mark="no (lazy)", language="sh"),
        PAGE.format(mark="later", language="sh"),
        PAGE.format(mark="server", language="bash"),
        "```\necho one\n```\n",
        "<!-- run: no (downloads) -->\n\ntext\n\n```sh\necho one\n```\n",
        "```text\none\n```\n",
        PAGE.format(mark="no (downloads)", language="sh") + "```text\none\n```\n",
    ],
)
def test_marks_that_are_not_known(page: str) -> None:
    with pytest.raises(MarkError):
        blocks_of(page)


def test_what_is_told_must_be_printed_in_its_order() -> None:
    assert missing(("one", "t...o"), "one\nzero\ntwo\n") == []
    assert missing(("two", "one"), "one\ntwo\n") == ["one"]
    assert missing(("on",), "one\n") == ["on"]
    assert "text" not in RUNNABLE


def test_a_block_that_fails_is_seen(tmp_path: Path) -> None:
    failing, printing = blocks_of("```sh\nfalse | true\n```\n\n```python\nprint(6 * 7)\n```\n")
    with reading(tmp_path) as reader:
        with pytest.raises(AssertionError, match="false"):
            reader.run(failing)
        assert reader.run(printing) == "42\n"
