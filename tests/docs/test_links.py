"""Links of the pages that are no part of the site lead somewhere, and every picture is one that the script draws."""

import importlib.util
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT

PICTURES = ROOT / "docs" / "pictures"
PAGES = sorted(ROOT.glob("*.md"))


def anchors_of(page: Path) -> set[str]:
    """As GitHub and the site make them from headings without marks of punctuation."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_readmes_links_are_looked_at() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"docs/speculation.md", "docs/pictures/data-path.png", "examples"} <= set(links)
    assert "who-may-import-whom" in anchors_of(ROOT / "docs" / "structure.md")


def drawing() -> Any:
    spec = importlib.util.spec_from_file_location("draw", PICTURES / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_those_that_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = drawing()
    monkeypatch.setattr(draw, "HERE", tmp_path)
    draw.main()

    def sizes(folder: Path) -> dict[str, tuple[int, int]]:
        return {path.name: struct.unpack(">II", path.read_bytes()[16:24]) for path in folder.glob("*.png")}

    assert sizes(tmp_path) == sizes(PICTURES)
    assert set(draw.PICTURES) == {"data-path", "timeline", "guess"}
