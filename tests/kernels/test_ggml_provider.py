"""Where ggml's libraries come from; and those that cannot be used are refused, with torch in their place."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.errors import ForerouteError
from foreroute.kernels.ggml import known_answers, library
from foreroute.kernels.ggml.library import REFUSED, GgmlError, Library, open_library, try_out
from foreroute.model.build import stored_names
from tests.formats.gguf_writer import Kind, write_gguf
from tests.support.runs import assert_same_bits, generate

PINNED = open_library().folder


@pytest.fixture(autouse=True)
def _opened_anew() -> Iterator[None]:
    open_library.cache_clear()
    yield
    open_library.cache_clear()


def _foreign(folder: Path) -> Path:
    """Shared libraries of this Python under ggml's names: they open, and have none of its functions."""
    found = util.find_spec("xxhash._xxhash")
    assert found is not None
    assert found.origin is not None
    for name in ("ggml-base", "ggml-cpu"):
        shutil.copy(found.origin, folder / f"lib{name}.so")
    return folder


def test_a_library_without_the_functions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GgmlError, match="libggml-base lacks ggml_"):
        Library(_foreign(tmp_path))


def test_a_library_of_another_machine_is_refused(tmp_path: Path) -> None:
    """An ELF header of a class and a machine that this process cannot open."""
    for name in ("ggml-base", "ggml-cpu"):
        (tmp_path / f"lib{name}.so").write_bytes(b"\x7fELF\x01\x01\x01" + bytes(9) + b"\x03\x00\xb7\x00" + bytes(64))
    with pytest.raises(GgmlError, match=r"libggml-base.so cannot be opened: .*pip install 'libggml-python=="):
        Library(tmp_path)


def test_libraries_of_another_build_are_tried_out_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREROUTE_GGML", str(PINNED))
    assert open_library().folder == PINNED  # in a process, and then here


def test_one_that_does_not_pass_its_trial_is_not_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOREROUTE_GGML", str(_foreign(tmp_path)))
    monkeypatch.setattr(library, "Library", lambda folder: pytest.fail("opened in this process"))
    with pytest.raises(GgmlError, match="libggml-base lacks ggml_"):
        open_library()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.abort()", "ended the process that tried it out (signal 6"),
        ("import sys; print('illegal', file=sys.stderr); sys.exit(7)", "(exit code 7: illegal)"),
        (f"import sys; print('ggml is odd', file=sys.stderr); sys.exit({REFUSED})", "ggml is odd"),
    ],
)
def test_a_library_that_ends_the_process_is_refused(program: str, said: str) -> None:
    with pytest.raises(GgmlError) as caught:
        try_out(Path("/folder"), (sys.executable, "-c", program))
    assert said in str(caught.value)
    assert not str(caught.value).startswith(" ")


def test_a_trial_names_wrong_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert known_answers.main([str(PINNED)]) == 0
    monkeypatch.setattr("foreroute.kernels.ggml.known_answers._MOST_ERROR", -1.0)
    assert known_answers.main([str(PINNED)]) == REFUSED
    assert "gives wrong products of BF16" in capsys.readouterr().err


def test_where_they_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pinned package alone is opened unseen; then an installed llama-cpp-python."""
    assert library._provider() == (PINNED, True)
    monkeypatch.setattr(library, "_installed_version", lambda: "0.20.3")
    assert library._provider() == (PINNED, False)
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(library, "_package", {"libggml": None, "llama_cpp": tmp_path}.get)
    with pytest.raises(GgmlError, match="libggml-python is not installed"):
        library._provider()
    (tmp_path / "lib" / "libggml-base.so").touch()
    assert library._provider() == (tmp_path / "lib", False)
    monkeypatch.setenv("FOREROUTE_GGML", str(tmp_path))
    assert library._provider() == (tmp_path, False)


def test_the_cpu_is_looked_at_for_the_package_s_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: none with flags\nflags\t\t: fpu sse2 fma f16c bmi2\n")
    monkeypatch.setattr(library, "_CPU_INFO", info)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(GgmlError, match="lacks avx2, for which libggml-python was built"):
        open_library()


@pytest.fixture(scope="module")
def path(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf"), "qwen3moe", Kind.Q8_0, dense=Kind.Q8_0).path


def test_without_ggml_torch_computes_and_it_is_said(
    path: Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_package", lambda name: None)
    stored_names._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = load(path, "40%", dtype="float32")
    assert model.foreroute.plan.math == "own"
    note = model.foreroute.plan.math_note
    assert note in caplog.text
    assert note.startswith("Quantised weights are dequantised by torch at each use, much slower than ggml's kernels: ")
    assert "pip install 'libggml-python==0.20.2.post1'" in note
    assert_same_bits(generate(model), generate(load(path, "40%", dtype="float32", math="torch")))
    assert load(path, "40%", math="torch").foreroute.plan.math_note == ""
    with pytest.raises(ForerouteError, match="libggml-python is not installed"):
        load(path, "40%", math="ggml")


def test_a_type_that_the_library_lacks_is_said(
    path: Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer than the library: experts and dense matrices in it are dequantised."""
    types = {name: kind for name, kind in open_library().types.items() if name != "Q8_0"}
    monkeypatch.setattr(Library, "types", property(lambda _: types))
    model = load(path, "40%", dtype="float32")
    assert model.foreroute.plan.math == "own"
    assert "ggml 0.20.2 has no Q8_0" in model.foreroute.plan.math_note
    ours, theirs = (generate(one).logits for one in (model, load(path, "40%", dtype="float32", math="torch")))
    assert all(torch.allclose(left, right, atol=1e-4) for left, right in zip(ours, theirs, strict=True))
    with pytest.raises(
        ForerouteError, match=r"math=\"ggml\": model\.layers\.0\.mlp\.experts: ggml 0\.20\.2 has no Q8_0"
    ):
        load(path, "40%", math="ggml")


def test_nothing_is_said_of_a_model_without_blocks(checkpoints: Any, load: Callable[..., Any]) -> None:
    model = load(checkpoints.get("qwen3_moe"), "40%")
    assert (model.foreroute.plan.math, model.foreroute.plan.math_note) == ("own", "")
    with pytest.raises(ForerouteError, match="the weights are not stored in blocks"):
        load(checkpoints.get("qwen3_moe"), "40%", math="ggml")
    with torch.no_grad():
        assert model(torch.arange(4)[None]).logits.isfinite().all()
