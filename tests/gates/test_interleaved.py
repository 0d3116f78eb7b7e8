"""Packed stores with eight rows of a matrix side by side: lossless, exact at every budget, and refused elsewhere."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from foreroute.checkpoint.codecs import orders_of
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.quantised_layout import in_blocks
from foreroute.checkpoint.records import PackedStore
from foreroute.cli.main import main
from foreroute.errors import DeviceError, StoreError
from foreroute.kernels.ggml import bf16
from foreroute.kernels.ggml.interleaved import orders, plain_rows
from foreroute.kernels.ggml.layer import GgmlLayer
from foreroute.kernels.ggml.library import GgmlError
from foreroute.memory.plan import check_store
from foreroute.prepare.pack import pack
from tests.formats.gguf_writer import Kind, write_gguf
from tests.gates.test_blocks import BUDGETS, NEW_TOKENS, decoded_alone, decoded_together, first_difference, outputs
from tests.support.packs import quantiser_of, quiet
from tests.support.quantised import write_mxfp4
from tests.support.runs import ONE_PROMPT, assert_same_bits, expert_table, generate

# Experts' type -> architecture, and the dense weights' type. "hub" is gpt-oss as it is published: gate and up
# alternate there, and are taken apart.
SOURCES = {"Q4_0": "gpt-oss", "IQ4_NL": "qwen3moe", "MXFP4": "gpt-oss", "Q4_K": "qwen3moe"}
MADE = (*SOURCES, "hub")
pytestmark = pytest.mark.skipif(not set(SOURCES) <= set(orders()), reason="this CPU's ggml has other orders")


@pytest.fixture(scope="module")
def sources(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == "hub":
                made[name] = write_mxfp4(checkpoints.get("gpt_oss", "bf16"), folder / "model")
            else:
                is_qwen = SOURCES[name] == "qwen3moe"
                settings = (
                    {"num_experts": 16, "num_hidden_layers": 2, "head_dim": 64} if is_qwen
                    else {"num_local_experts": 16}
                )  # fmt: skip
                made[name] = write_gguf(folder, SOURCES[name], Kind[name], dense=Kind.Q8_0, **settings).path
        return made[name]

    return get


@pytest.fixture(scope="module")
def stores(sources: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """The store of a source, plain or interleaved."""
    folder = tmp_path_factory.mktemp("stores")

    def get(name: str, is_interleaved: bool) -> Path:
        path = folder / f"{name}.{is_interleaved}"
        if not path.exists():
            pack(table_of(sources(name)), path, progress=quiet, orders=orders() if is_interleaved else {})
        return path

    return get


def table_of(path: Path) -> ExpertTable:
    return in_blocks(expert_table(path))


def header_of(store: Path) -> dict[str, Any]:
    with open(store, "rb") as file:
        _, length, _ = struct.unpack("<8sQQ", file.read(24))
        header: dict[str, Any] = json.loads(file.read(length))
    return header


def with_header(store: Path, path: Path, **changed: Any) -> Path:
    """A copy of a store whose header says something else, with a right checksum."""
    whole = store.read_bytes()
    header = json.dumps({**header_of(store), **changed}, sort_keys=True).encode()
    path.write_bytes(struct.pack("<8sQQ", whole[:8], len(header), xxhash.xxh3_64_intdigest(header)) + header)
    with open(path, "ab") as file:
        file.write(whole[file.tell() :])
    return path


def matrices_in(store: PackedStore, key: int) -> list[np.ndarray]:
    """Per matrix of a record its rows [rows, bytes of a row], one after the other; gate and up apart."""
    (read,) = store.reads_of(store.table)(key)
    raw = np.fromfile(read.path, np.uint8, count=read.nbytes, offset=read.offset)
    layer = store.table.layers[store.table.expert_id(key).layer]
    found = []
    for part in layer.parts:
        for matrix in part.matrices:
            place = layer.layout.parts[matrix.at[0]]
            rows = raw[place.offset : place.offset + place.nbytes].reshape(matrix.rows, -1)
            if matrix.coding.order:
                rows = plain_rows(matrix.coding.block_type, torch.from_numpy(rows.copy())).numpy()
            alternate = len(part.matrices) == 1 and part.name == "gate_up_proj"
            found.extend([rows[::2], rows[1::2]] if alternate and layer.form.gates == "alternating" else [rows])
    return found


@pytest.mark.parametrize("name", MADE)
def test_plain_rows_can_be_made_of_it_again(name: str, sources: Any, stores: Any) -> None:
    source = expert_table(sources(name))
    plain, other = (PackedStore(stores(name, is_so), source) for is_so in (False, True))
    kind = "MXFP4" if name == "hub" else name
    assert orders_of(plain.table) == {}
    assert orders_of(other.table) == {kind: orders()[kind]}
    for key in (0, plain.table.keys.all()[-1]):
        ours, theirs = matrices_in(other, key), matrices_in(plain, key)
        assert len(ours) == len(theirs) >= 3
        assert all(np.array_equal(one, two) for one, two in zip(ours, theirs, strict=True))
    assert stores(name, True).read_bytes()[-4096:] != stores(name, False).read_bytes()[-4096:]


def test_the_header_says_it_per_matrix(stores: Any) -> None:
    assert "orders" not in header_of(stores("Q4_0", False))
    header = header_of(stores("Q4_0", True))
    assert header["orders"] == {"Q4_0": orders()["Q4_0"]}
    said = {part["name"]: part.get("order") for part in header["layers"][0]["parts"]}
    assert len(said) > 3
    assert {order for name, order in said.items() if "bias" in name} == {None}
    assert {order for name, order in said.items() if "bias" not in name} == {orders()["Q4_0"]}


@pytest.mark.parametrize("name", MADE)
def test_the_same_bits_at_every_budget(name: str, sources: Any, stores: Any, load: Any) -> None:
    """Those of the same store with every expert resident; and nearly the numbers of plain rows."""
    path, packed = sources(name), str(stores(name, True))
    whole = load(path, "100%", prefetch="none", packed=packed)
    plan = whole.foreroute.plan
    assert (plan.math, plan.layout, plan.source) == ("ggml", "interleaved", "packed")
    matrices = [matrix for form in forms_of(whole) for matrix in (*form.first, form.down)]
    assert all(matrix.is_interleaved for matrix in matrices)
    expected = outputs(whole)
    assert expected[1].num_distinct > 6, "a model that repeats itself tests little"
    for memory, prefetch in BUDGETS[name == "hub" :]:  # whose tokens need 17 %
        model = load(path, memory, prefetch=prefetch, packed=packed)
        for ours, theirs in zip(outputs(model), expected, strict=True):
            assert_same_bits(ours, theirs)
        assert (model.foreroute.stats().evictions > 0) == (memory != "100%")
    ids = torch.randint(5, 240, (1, 40), generator=torch.Generator().manual_seed(3))
    plain = load(path, "100%", prefetch="none", packed=str(stores(name, False)))
    assert plain.foreroute.plan.layout == "plain"
    with torch.no_grad():
        ours, theirs = whole(ids).logits.float(), plain(ids).logits.float()
    assert float((ours - theirs).abs().median()) < 1e-3 * float(theirs.std())


def forms_of(model: Any) -> list[Any]:
    kernels = model.foreroute.engine.kernels
    assert all(isinstance(layer, GgmlLayer) for layer in kernels)
    return [layer._graphs.form for layer in kernels]


@pytest.mark.parametrize("name", SOURCES)
def test_a_token_among_eight_has_the_bits_that_it_has_alone(name: str, sources: Any, stores: Any, load: Any) -> None:
    packed = str(stores(name, True))
    alone = decoded_alone(load(sources(name), "100%", prefetch="none", packed=packed))
    for memory in ("15%", "25%", "50%", "100%"):
        model = load(sources(name), memory, packed=packed)
        assert first_difference(decoded_together(model), alone) == "", memory
        assert (model.foreroute.stats().evictions > 0) == (memory != "100%")


@pytest.mark.parametrize("name", MADE)
def test_torch_dequantises_it_to_the_same_bits(name: str, sources: Any, stores: Any, load: Any) -> None:
    found = [
        generate(load(sources(name), "50%", packed=str(stores(name, is_so)), math="torch"), ONE_PROMPT, NEW_TOKENS)
        for is_so in (False, True)
    ]
    assert_same_bits(*found)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_long_prompt(name: str, has_bf16: bool, sources: Any, stores: Any, load: Any, monkeypatch: Any) -> None:
    """In bf16 the bits of plain rows, as both become the same numbers; else nearly those."""
    monkeypatch.setattr(bf16, "has_bf16", lambda: has_bf16)
    monkeypatch.setattr(bf16, "_FEWEST", 1)
    monkeypatch.setattr(bf16, "_COSTS", dict.fromkeys(bf16._COSTS, (0.0, 1.0)))
    ids = torch.randint(5, 240, (1, 60), generator=torch.Generator().manual_seed(4))
    found = []
    for is_so in (False, True):
        model = load(sources(name), "50%", packed=str(stores(name, is_so)), prefetch="none")
        with torch.no_grad():
            found.append(model(ids).logits.float())
    plain, ours = found
    assert torch.equal(plain, ours) if has_bf16 else float((ours - plain).abs().median()) < 1e-3 * float(plain.std())


def test_quantised_by_pack(checkpoints: Any, load: Any, tmp_path: Path) -> None:
    folder = checkpoints.get("gpt_oss", "bf16")
    for name, asked in (("plain", {}), ("interleaved", orders())):
        quantiser = quantiser_of(folder, "q4_0", num_threads=2)
        pack(quantiser.source, tmp_path / name, progress=quiet, quantiser=quantiser, orders=asked)
    found = [
        generate(load(folder, "25%", packed=str(tmp_path / name), math="torch")) for name in ("plain", "interleaved")
    ]
    assert_same_bits(*found)
    whole, part = (load(folder, memory, packed=str(tmp_path / "interleaved")) for memory in ("100%", "25%"))
    assert (part.foreroute.plan.stored_dtype, part.foreroute.plan.layout) == ("q4_0", "interleaved")
    assert_same_bits(generate(part), generate(whole))


class TestRefused:
    def expect(self, load: Any, source: Path, store: Path, *fragments: str) -> None:
        with pytest.raises(StoreError) as caught:
            load(source, packed=str(store))
        for fragment in (str(store), "foreroute pack", *fragments):
            assert fragment in str(caught.value), caught.value

    def test_another_order(self, sources: Any, load: Any, tmp_path: Path) -> None:
        """Of another CPU or build; also where torch would compute, as what it means is not known here."""
        store = tmp_path / "store"
        pack(table_of(sources("Q4_0")), store, progress=quiet, orders={"Q4_0": "of-an-ARM"})
        self.expect(load, sources("Q4_0"), store, "another CPU", "Q4_0", "of-an-ARM", "--force", "--layout plain")

    def test_a_machine_without_ggml(self, sources: Any, stores: Any, load: Any, monkeypatch: Any) -> None:
        def absent() -> Any:
            raise GgmlError("libggml-python is not installed. Install it.")

        monkeypatch.setattr("foreroute.kernels.ggml.interleaved.orders", absent)
        self.expect(load, sources("Q4_0"), stores("Q4_0", True), "not installed", "--layout plain")

    @pytest.mark.parametrize("said", [{"Q9": "x"}, {}, {"Q4_0": "x", "Q9": "y"}])
    def test_a_header_of_an_unknown_layout(
        self, said: Any, sources: Any, stores: Any, load: Any, tmp_path: Path
    ) -> None:
        store = with_header(stores("Q4_0", True), tmp_path / "store", orders=said)
        self.expect(load, sources("Q4_0"), store, "laid out differently")

    @pytest.mark.parametrize("said", [None, "interleaved", ["Q4_0"], {"Q4_0": 8}])
    def test_a_damaged_header(self, said: Any, sources: Any, stores: Any, load: Any, tmp_path: Path) -> None:
        store = with_header(stores("Q4_0", True), tmp_path / "store", orders=said)
        self.expect(load, sources("Q4_0"), store, "damaged header (orders is")

    def test_truncated(self, sources: Any, stores: Any, load: Any, tmp_path: Path) -> None:
        store = tmp_path / "store"
        store.write_bytes(stores("Q4_0", True).read_bytes()[:-4096])
        self.expect(load, sources("Q4_0"), store, "half written or truncated")

    def test_on_a_device(self, sources: Any, stores: Any) -> None:
        store = PackedStore(stores("Q4_0", True), expert_table(sources("Q4_0")))
        with pytest.raises(DeviceError, match=r"--layout plain --force"):
            check_store(store, "stored")


@pytest.mark.parametrize("name", ["Q4_K", "hub"])
@pytest.mark.parametrize("kind", ["resident", "on-demand"])
def test_verify(name: str, kind: str, sources: Any, stores: Any, capfd: Any) -> None:
    code, said = verified(sources(name), stores(name, True), capfd, "--reference", kind)
    assert code == 0, said
    answer = json.loads(said)
    assert (answer["same"], answer["plan"]["layout"]) == (True, "interleaved")
    assert 0 < answer["beside_torch"]["median_kl"] < 0.02


def test_verify_finds_a_store_of_other_bytes(sources: Any, stores: Any, tmp_path: Path, capfd: Any) -> None:
    """A record whose checksum is right, and whose blocks are not the checkpoint's."""
    store = tmp_path / "store"
    store.write_bytes(stores("Q4_0", True).read_bytes())
    found = PackedStore(store, expert_table(sources("Q4_0")))
    reads, keys = found.reads_of(found.table), found.table.keys.all()
    with open(store, "r+b") as file:
        for record, key in enumerate(keys):
            (read,) = reads(key)
            file.seek(read.offset)
            raw = bytearray(file.read(read.nbytes))
            raw[200] ^= 1
            file.seek(read.offset)
            file.write(raw)
            file.seek(found._geometry.table_start + 8 * record)
            file.write(struct.pack("<Q", xxhash.xxh3_64_intdigest(raw)))
    code, said = verified(sources("Q4_0"), store, capfd)
    assert code == 1
    answer = json.loads(said)
    assert not answer["same"]
    assert answer["first_difference"]["part"] == "experts"
    assert "its slot holds other bytes than the checkpoint" in answer["first_difference"]["reasons"][0]


def verified(source: Path, store: Path, capfd: Any, *flags: str) -> tuple[int, str]:
    threads = torch.get_num_threads()
    code = main(["verify", str(source), "--packed", str(store), "--tokens", "6", "--threads", "1", "--json", *flags])
    torch.set_num_threads(threads)
    out, err = capfd.readouterr()
    return code, out + err
