"""A sidecar comes back as it was written, byte for byte, and what is damaged or another model's is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foreroute.errors import PredictorError
from foreroute.predict import sidecar as sidecars
from foreroute.predict.fitted import RidgeLayer, TokenTable
from foreroute.predict.sidecar import SIDECAR_NAME, Sidecar, find_sidecar, read_whole, write_whole


def sidecar() -> Sidecar:
    generator = torch.Generator().manual_seed(0)
    layer = RidgeLayer(*(torch.randn(shape, generator=generator) for shape in ((4, 3), (6, 3), (3,))))
    return Sidecar(
        "the fingerprint",
        ridge=[layer, None],
        default_vectors=[torch.randn(5, 4, generator=generator), None],
        token_table=TokenTable(
            torch.randn(7, 5, generator=generator).half(),
            torch.randn(4, 5, generator=generator),
            torch.randn(4, generator=generator),
        ),
        popularity=[torch.arange(5), torch.arange(3)],
        choice=["ridge", None],
        about={"tokens": {"fitted": 3}, "b": [1.5, None], "a": 1},
        estimator={"head": torch.randn(4, 3, generator=generator)},
    )


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    sidecar().save(tmp_path / "a")
    back = Sidecar.load(tmp_path / "a", "the fingerprint")
    written = sidecar()
    assert (back.choice, back.about) == (written.choice, written.about)
    assert back.tensors().keys() == written.tensors().keys()
    for name, tensor in written.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
        assert back.tensors()[name].dtype == tensor.dtype
    assert back.ridge[1] is None
    assert back.default_vectors[1] is None


def test_one_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It has a guess from before attention besides: what it says of the others holds."""
    sidecar().save(tmp_path / "new")
    tensors, about = read_whole(tmp_path / "new")
    older = tensors | {"entry.1.weights": torch.ones(4, 3), "entry.1.bias": torch.ones(3)}
    write_whole(tmp_path / "old", older, {**about, "digest": sidecars._digest(older)})
    back = Sidecar.load(tmp_path / "old", "the fingerprint")
    back.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()
    write_whole(
        tmp_path / "damaged", older | {"entry.1.bias": torch.zeros(3)}, about | {"digest": sidecars._digest(older)}
    )
    with pytest.raises(PredictorError, match="damaged"):
        Sidecar.load(tmp_path / "damaged", "the fingerprint")


def test_the_bytes_depend_on_the_contents_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        sidecar().save(tmp_path / name)
    replace(sidecar(), choice=[None, None]).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_another_models_is_refused(tmp_path: Path) -> None:
    sidecar().save(tmp_path / "a")
    with pytest.raises(PredictorError, match="another model"):
        Sidecar.load(tmp_path / "a", "another fingerprint")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    sidecar().save(tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:kept])
    with pytest.raises(PredictorError, match="truncated"):
        Sidecar.load(tmp_path / "a", "the fingerprint")


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    sidecar().save(tmp_path / "a")
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(PredictorError, match="damaged"):
        Sidecar.load(tmp_path / "a", "the fingerprint")


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="cannot be written"):
        sidecar().save(tmp_path / "absent" / "a")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_one_that_is_not_written_to_the_end_leaves_the_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = tmp_path / SIDECAR_NAME
    sidecar().save(path)
    before = path.read_bytes()

    def half(tensors: object, place: Path, metadata: object) -> None:
        place.write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr("foreroute.predict.sidecar.save_file", half)
    with pytest.raises((PredictorError, KeyboardInterrupt)):
        sidecar().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_which_file_is_used(tmp_path: Path) -> None:
    assert find_sidecar(tmp_path, "auto") is None
    with pytest.raises(PredictorError, match="does not exist"):
        find_sidecar(tmp_path, str(tmp_path))
    sidecar().save(tmp_path / SIDECAR_NAME)
    assert find_sidecar(tmp_path, "auto") == tmp_path / SIDECAR_NAME
    assert find_sidecar(tmp_path, "no") is None
    assert find_sidecar(tmp_path / "elsewhere", str(tmp_path)) == tmp_path / SIDECAR_NAME
    with pytest.raises(PredictorError, match="does not exist"):
        find_sidecar(tmp_path, str(tmp_path / "nothing"))


def test_no_file_stays_mapped(tmp_path: Path) -> None:
    """What is written over or cut off later changes nothing, and ends no process."""
    written, path = sidecar(), tmp_path / SIDECAR_NAME
    written.save(path)
    back = Sidecar.load(path, "the fingerprint")
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")
    assert all(torch.equal(back.tensors()[name], tensor) for name, tensor in written.tensors().items())
