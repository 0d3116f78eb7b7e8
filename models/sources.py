"""Where the text comes from: Debian packages and the running Python's standard library, as plain documents.

`apt-get download` needs no root and no configured hub; nothing is installed. Every source states its licence and its
share of the training text.
"""

from __future__ import annotations

import gzip
import html
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Document = tuple[str, str]  # (name, text); the name decides the split


class SourceError(Exception):
    """A text source could not be fetched or was empty; says what to install."""


@dataclass(frozen=True)
class Source:
    """One body of text: `package` is fetched from the Debian archive (None: already on the machine)."""

    name: str
    package: str | None
    licence: str
    share: float
    read: Callable[[Path], Iterator[Document]]


def fetch(package: str, cache: Path) -> Path:
    """Download and unpack a Debian package under `cache`, once; returns the unpacked root.

    Raises:
        SourceError: apt could not find the package (run `apt-get update`) or the tools are not there.
    """
    root = cache / package
    if (root / ".done").exists():
        return root
    root.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", package], cwd=root, check=True, capture_output=True)
        (archive,) = root.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise SourceError(f"cannot fetch {package}: run `apt-get update` on a Debian machine ({error})") from error
    archive.unlink()
    (root / ".done").touch()
    return root


def _text(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    return raw.decode("utf-8", errors="replace")


def _files(root: Path, pattern: str, skip: str = "$^") -> Iterator[Path]:
    bad = re.compile(skip)
    return (path for path in sorted(root.rglob(pattern)) if path.is_file() and not bad.search(str(path)))


def python_stdlib(_: Path) -> Iterator[Document]:
    """Standard library modules without tests, tables and bundled packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = r"site-packages|/tests?/|/encodings/|pydoc_data|lib2to3/|ensurepip|idle_test|__phello__|_sysconfigdata"
    for path in _files(root, "*.py", skip):
        yield str(path.relative_to(root)), _text(path)


def kernel_docs(root: Path) -> Iterator[Document]:
    """The Linux kernel's documentation, in English, as reStructuredText."""
    for path in _files(root, "*.rst.txt", "/translations/"):
        yield str(path.relative_to(root)), _text(path)


def perl_pods(root: Path) -> Iterator[Document]:
    """Perl's manuals without the per-release change lists."""
    for path in _files(root, "*.pod", r"delta\.pod|perltoc|perl\d+"):
        yield str(path.relative_to(root)), _text(path)


def _unroff(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if line.startswith(('.\\"', "'\\\"", ".TH", ".ad", ".hy", ".if", ".ie", ".el", ".ds", ".de", "..")):
            continue
        if line.startswith((".", "'")):
            words = line.split(maxsplit=1)
            line = words[1].replace('"', "") if len(words) > 1 else ""
        line = re.sub(r"\\f[BIRP]|\\f\(..|\\&|\\[/,|^]", "", line)
        lines.append(re.sub(r"\\\(..|\\\[..\]", "'", line).replace("\\-", "-").replace("\\e", "\\"))
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip() + "\n"


def man_pages(root: Path) -> Iterator[Document]:
    """Linux manual pages with the roff macros taken out; redirect stubs are dropped."""
    for path in _files(root / "usr/share/man", "*.gz"):
        text = _unroff(_text(path))
        if len(text) > 500:
            yield str(path.relative_to(root)), text


def html_pages(root: Path) -> Iterator[Document]:
    """HTML manuals as text: tags dropped, entities resolved, navigation cut by its length."""
    for path in _files(root, "*.html", r"bookindex|index\.html|html/(?!en-US)[a-z]{2,3}-[A-Z]{2}/"):
        body = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", "", _text(path))
        body = re.sub(r"(?i)</(p|div|h\d|li|tr|dt|dd|pre|table)>|<br ?/?>", "\n", body)
        lines = html.unescape(re.sub(r"(?s)<[^>]*>", "", body)).replace("\xa0", " ").splitlines()
        kept = re.sub(r"\n{2,}", "\n\n", "\n".join(line.rstrip() for line in lines))
        yield str(path.relative_to(root)), kept.strip() + "\n"


def glosses(root: Path) -> Iterator[Document]:
    """WordNet entries, one document per synset: `word: gloss`."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in _text(root / f"usr/share/wordnet/data.{part}").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            head, gloss = line.split(" | ", 1)
            word = re.sub(r"\(\w+\)$", "", head.split()[4]).replace("_", " ")
            yield word, f"{word}: {gloss.strip()}\n"


def dictionary(root: Path) -> Iterator[Document]:
    """A dictd dictionary, one document per entry (entries start at the left margin)."""
    (path,) = root.glob("usr/share/dictd/*.dict.dz")
    for entry in re.split(r"\n(?=\S[^\n]*\n\n   )", _text(path)):
        if len(entry) > 80:
            yield entry.split("\n", 1)[0], re.sub(r"[{}]", "", entry).strip() + "\n"


SOURCES: tuple[Source, ...] = (
    Source("python", None, "PSF-2.0", 0.40, python_stdlib),
    Source("kernel", "linux-doc-6.1", "GPL-2.0", 0.06, kernel_docs),
    Source("perl", "perl-doc", "GPL-1+ or Artistic", 0.02, perl_pods),
    Source("man3", "manpages-dev", "GPL-2+, Linux-man-pages-copyleft, BSD, MIT", 0.12, man_pages),
    Source("man", "manpages", "GPL-2+, Linux-man-pages-copyleft, BSD, MIT", 0.08, man_pages),
    Source("postgresql", "postgresql-doc-15", "PostgreSQL", 0.20, html_pages),
    Source("handbook", "debian-handbook", "CC-BY-SA-3.0 or GPL-2+", 0.04, html_pages),
    Source("wordnet", "wordnet-base", "WordNet 3.0 licence (Princeton, permissive)", 0.04, glosses),
    Source("foldoc", "dict-foldoc", "GFDL-1.2+", 0.04, dictionary),
)


def documents(source: Source, cache: Path) -> list[Document]:
    """All documents of a source, fetched if need be.

    Raises:
        SourceError: nothing was found.
    """
    root = fetch(source.package, cache) if source.package else cache
    found = [(name, text) for name, text in source.read(root) if text.strip()]
    if not found:
        raise SourceError(f"source {source.name} is empty: reinstall {source.package or 'Python with its sources'}")
    return found
