"""Text and JSON files of a checkpoint: what is wrong with one is said of it by name."""

from pathlib import Path

import pytest

from foreroute.errors import CheckpointError, CorruptCheckpointError, PromptError, StoreError, named, reason_of
from foreroute.whole_files import parse_object, read_object, read_text, refuse_pointer


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"a": 1', "it is cut off"),
        (b'{"a": "b', "Unterminated string"),
        (b"[1]", "it holds a list"),
        (b"null", "it holds null"),
        (b"5", "it holds a number"),
        (b'"x"', "it holds a text"),
        (b"true", "it holds true or false"),
        (b'{"a": \xff}', "byte 6 is not UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_object(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_object(path, CheckpointError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"é": [Infinity, {"a": null}]}', encoding="utf-8")
    assert read_object(path) == {"é": [float("inf"), {"a": None}]}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        read_text(tmp_path / "nowhere", PromptError)
    with pytest.raises(PromptError, match="Is a directory"):
        read_text(tmp_path, PromptError)
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(PromptError, match=r"latin is not UTF-8 text \(byte 0\)"):
        read_text(tmp_path / "latin", PromptError)


def test_a_file_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreroute.whole_files._MOST_BYTES", 2**20)
    with pytest.raises(CorruptCheckpointError, match="more than 1 MiB"):
        read_text(Path("/dev/zero"))


def test_pointers_of_all_versions() -> None:
    for version in ("https://git-lfs.github.com/spec/v1", "https://hawser.github.com/spec/v1"):
        with pytest.raises(StoreError, match=r"of 12 bytes.*git lfs pull"):
            refuse_pointer(Path("a"), f"version {version}\noid sha256:00\nsize 12\n".encode(), StoreError)
    refuse_pointer(Path("a"), b"version https://example.org\n")


def test_advice_of_its_own() -> None:
    with pytest.raises(StoreError, match=r"x is damaged \(it is cut off\)\. Pack it again\."):
        parse_object(b"{", "x is damaged", StoreError, "Pack it again.")


class TestNamed:
    """What other people's parsers raise."""

    def test_errors_get_a_name(self) -> None:
        class TemplateSyntaxError(Exception):
            """Derived from nothing that is listed, as that of jinja2."""

        TemplateError = type("TemplateError", (TemplateSyntaxError,), {})
        for error in (ValueError("a\nb  c."), Exception("a b c"), TemplateError("a b c")):
            with (
                pytest.raises(CorruptCheckpointError, match=r"^file: a b c\. Do this\.$"),
                named("file", advice="Do this."),
            ):
                raise error

    def test_ours_and_ctrl_c_pass(self) -> None:
        for error in (PromptError("x"), KeyboardInterrupt(), SystemExit(3)):
            with pytest.raises(type(error)) as caught, named("file"):
                raise error
            assert caught.value is error

    def test_what_is_not_listed_passes(self) -> None:
        class Unknown(Exception):
            """Not listed."""

        with pytest.raises(Unknown), named("file"):
            raise Unknown

    def test_reasons(self) -> None:
        assert reason_of(KeyError("a")) == "'a' is missing"
        assert reason_of(ValueError()) == "ValueError"
        assert reason_of(RecursionError("maximum recursion depth exceeded")) == "it is nested too deep"
        assert len(reason_of(ValueError("x" * 1000))) < 310


def test_a_bug_of_ours_is_not_said_to_be_a_broken_file():
    """An assertion that a line of this package raises is no parser's word on a file; one of a library is."""
    from foreroute.memory.budget import plan_pool

    with pytest.raises(AssertionError), named("a file"):
        plan_pool(1, [0], [1], [1])
    with pytest.raises(CorruptCheckpointError, match="a file"), named("a file"):
        raise AssertionError("of a library")
