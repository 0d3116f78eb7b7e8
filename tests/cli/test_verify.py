"""`foreroute verify`: equal models are equal, and each planted fault is found and named for what it is."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from foreroute.checkpoint.index import INDEX, read_sharded
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import STORE_NAME
from foreroute.cli.commands import verify
from foreroute.engine.moe_step import MoeStep
from foreroute.loading import engines
from foreroute.loading import expert_math as family_math
from foreroute.loading import load as loader
from foreroute.model.build.skeleton import outline
from foreroute.prepare.pack import pack
from foreroute.residency.slots import READY, Residency
from foreroute.transfer.load import Load
from foreroute.verification import reference
from tests.support.broken import copied
from tests.support.checkpoints import random_model, save_checkpoint, save_tokenizer
from tests.support.families import FAMILIES
from tests.support.runs import expert_table, slots_memory

FAST = ("--threads", "1", "--tokens", "8")
TEXTS = ("The ship came into the harbour with nobody on board.", "1 + 1 = ")
# The expert that is tampered with, by MoE layer, and another of its layer.
LAYER, EXPERT, OTHER = 1, 5, 7


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join((*TEXTS, "")))
    return path


@pytest.fixture
def verified(run, checkpoints, prompts):
    """Run the command with --json on a family's checkpoint, or on a folder."""

    def verifying(model, *flags, expect: int):
        folder = checkpoints.get(model) if isinstance(model, str) else model
        ran = run("verify", folder, "--prompts", prompts, "--json", *FAST, *flags)
        assert ran.code == expect, ran.out + ran.err
        return ran.json

    return verifying


@pytest.fixture
def misread(monkeypatch):
    """From now on, this expert's bytes are read where another's lie."""

    def misreading(family_folder: Path, expert: int, instead: int) -> None:
        reads, base = ExpertTable.reads, LAYER * expert_table(family_folder).num_experts

        def others(table, key):
            return reads(table, base + instead if key == base + expert else key)

        monkeypatch.setattr(ExpertTable, "reads", others)

    return misreading


def swapped_store(folder: Path, path: Path) -> None:
    """A packed store with valid checksums and two experts in each other's place."""
    table = expert_table(folder)
    base = LAYER * table.num_experts
    turned = {base + EXPERT: base + OTHER, base + OTHER: base + EXPERT}
    with pytest.MonkeyPatch.context() as patch:
        reads = ExpertTable.reads
        patch.setattr(ExpertTable, "reads", lambda self, key: reads(self, turned.get(key, key)))
        pack(table, path, progress=lambda done, total: None)


@pytest.fixture
def folder_of_two(checkpoints, tmp_path):
    """A single file, and the index and shards of an older model of the same shape beside it."""
    folder = copied(checkpoints.get("qwen3_moe"), tmp_path / "two")
    for path in checkpoints.get("qwen3_moe", sharded=True, seed=5).glob("model*.safetensors*"):
        shutil.copyfile(path, folder / path.name)
    return folder


class TestTheSame:
    @pytest.mark.parametrize("kind", ["resident", "on-demand"])
    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
    def test_every_bit(self, verified, checkpoints, family, kind):
        answer = verified(family, "--reference", kind, expect=0)
        plan = answer.pop("plan")
        assert plan["num_slots"] < plan["total_slots"]
        assert answer.pop("evictions") > 0
        assert answer.pop("prefetch_used") > 0
        layers = len(expert_table(checkpoints.get(family)).layers)
        assert answer == {
            "same": True,
            "reference": kind,
            "prompts": 2,
            "tokens": 16,
            "same_tokens": 16,
            "layers_compared": 16 * layers,
            "first_difference": None,
            "complaints": [],
            "beside_torch": None,
        }

    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
    def test_bf16_from_a_packed_store(self, verified, checkpoints, tmp_path, family):
        folder = checkpoints.get(family, "bf16")
        pack(expert_table(folder), tmp_path / STORE_NAME, progress=lambda done, total: None)
        answer = verified(folder, "--packed", tmp_path, "--eviction", "lru", expect=0)
        assert answer["plan"]["source"] == "packed"
        assert answer["plan"]["compute_dtype"] == "bfloat16"

    def test_where_the_familys_own_forward_runs(self, verified, monkeypatch):
        monkeypatch.setattr(family_math, "prove_math", lambda *_: False)
        assert verified("gpt_oss", expect=0)["plan"]["math"] == "family"

    def test_it_says_what_it_proves(self, run, checkpoints):
        folder = checkpoints.get("deepseek_v3")
        ran = run("verify", folder, *FAST)
        assert ran.code == 0, ran.out + ran.err
        assert "the same, bit for bit: yes" in ran.out
        assert "40 of 40" in ran.out
        assert "what transformers gives with every expert in memory" in ran.out
        ran = run("verify", folder, "--reference", "on-demand", *FAST)
        assert "Cache, eviction, prefetches and packed store change nothing" in ran.out


class TestFaults:
    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
    def test_an_expert_read_in_anothers_place(self, verified, checkpoints, misread, family):
        misread(checkpoints.get(family), EXPERT, OTHER)
        first = verified(family, expect=1)["first_difference"]
        name = expert_table(checkpoints.get(family)).layers[LAYER].name
        assert (first["prompt"], first["step"], first["part"]) == (1, 1, "experts")
        assert (first["moe_layer"], first["module"], first["experts"]) == (LAYER, name, [EXPERT])
        assert first["reasons"] == [
            f"Expert {EXPERT} of MoE layer {LAYER} ({name}): its slot holds other bytes than the checkpoint; "
            f"they are those of expert {OTHER} of MoE layer {LAYER}."
        ]

    def test_in_another_dtype_than_is_stored(self, verified, checkpoints, misread):
        folder = checkpoints.get("gpt_oss", "bf16")
        verified(folder, "--dtype", "float32", expect=0)
        misread(folder, EXPERT, OTHER)
        first = verified(folder, "--dtype", "float32", expect=1)["first_difference"]
        assert (first["moe_layer"], first["experts"]) == (LAYER, [EXPERT])
        assert f"they are those of expert {OTHER}" in first["reasons"][0]

    @pytest.mark.parametrize("kind", ["resident", "on-demand"])
    def test_two_experts_in_each_others_place_in_the_store(self, verified, run, checkpoints, tmp_path, kind):
        folder = copied(checkpoints.get("qwen3_moe"), tmp_path / "model")
        swapped_store(folder, folder / STORE_NAME)
        first = verified(folder, "--reference", kind, expect=1)["first_difference"]
        assert first["moe_layer"] == LAYER
        assert first["experts"] == [EXPERT, OTHER]
        assert f"they are those of expert {OTHER}" in first["reasons"][0]
        assert f"they are those of expert {EXPERT}" in first["reasons"][1]
        verified(folder, "--packed", "no", expect=0)
        shown = run("verify", folder, *FAST).out
        assert "the same, bit for bit: no" in shown
        assert "First difference: prompt 1 ('Once upon a time" in shown
        assert "foreroute pack MODEL --force" in shown

    @pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
    def test_a_slot_that_keeps_what_it_held(self, verified, checkpoints, monkeypatch, family):
        """A read that says it is over and has written nothing, once the slots have been used."""
        place, seen, skipped = Load._place, [], []

        def lazy(load):
            seen.append(load._key)
            if len(seen) > 150 and load._key // 16 == LAYER:
                skipped.append(load._key)
                return
            place(load)

        monkeypatch.setattr(Load, "_place", lazy)
        first = verified(family, "--reference", "resident", expect=1)["first_difference"]
        assert first["part"] == "experts"
        assert first["moe_layer"] == LAYER
        assert first["experts"]
        assert {LAYER * 16 + expert for expert in first["experts"]} <= set(skipped)
        assert "its slot holds other bytes than the checkpoint; they are those of expert" in first["reasons"][0]

    def test_a_pool_that_names_the_wrong_slot(self, verified, checkpoints, monkeypatch):
        demand, base = Residency.demand, LAYER * expert_table(checkpoints.get("qwen3_moe")).num_experts

        def lying(pool, keys):
            found = demand(pool, keys)
            others = [base + other for other in range(16) if other != EXPERT and pool.state(base + other) == READY]
            hits = [
                (key, pool.slot_of(next(iter(others), key) if key == base + EXPERT else key)) for key, _ in found.hits
            ]
            return found._replace(hits=hits)

        monkeypatch.setattr(Residency, "demand", lying)
        first = verified("qwen3_moe", expect=1)["first_difference"]
        assert (first["moe_layer"], first["experts"]) == (LAYER, [EXPERT])
        assert "it was computed from a slot that was loaded for expert" in first["reasons"][0]

    def test_maths(self, verified, monkeypatch):
        """Not a slot's fault: nothing else is left."""
        compute = MoeStep.compute

        def rounding(engine, layer, hidden, ids, weights):
            out = compute(engine, layer, hidden, ids, weights)
            if layer == LAYER and len(hidden) == 1:
                out[0, 0] = torch.nextafter(out[0, 0], out.new_tensor(torch.inf))
            return out

        monkeypatch.setattr(MoeStep, "compute", rounding)
        first = verified("gpt_oss", expect=1)["first_difference"]
        assert (first["part"], first["moe_layer"], first["step"]) == ("experts", LAYER, 2)
        assert first["position"] == len(TEXTS[0])
        assert first["experts"] == []
        assert "the maths differs" in first["reasons"][0]

    @pytest.mark.parametrize(
        ("tensor", "part", "moe_layer"),
        [
            ("model.layers.2.self_attn.o_proj.weight", "dense", 2),
            ("model.layers.1.mlp.gate.weight", "router", 1),
            ("lm_head.weight", "head", None),
        ],
    )
    def test_a_dense_weight(self, verified, monkeypatch, tensor, part, moe_layer):
        load_skeleton = loader.load_skeleton

        def spoilt(*args, **kwargs):
            model = load_skeleton(*args, **kwargs)
            with torch.no_grad():
                model.get_parameter(tensor).view(-1)[:9] *= 1.01
            return model

        monkeypatch.setattr(loader, "load_skeleton", spoilt)
        first = verified("qwen3_moe", expect=1)["first_difference"]
        assert (first["part"], first["moe_layer"], first["tensors"]) == (part, moe_layer, [tensor])
        assert tensor in first["reasons"][0]

    @pytest.mark.parametrize("kind", ["resident", "on-demand"])
    def test_weights_of_other_files_than_transformers_takes(self, verified, folder_of_two, monkeypatch, kind):
        """A stale index beside a newer single file: whoever reads the former's shards is found out."""
        assert verified(folder_of_two, "--reference", kind, expect=0)["same"]

        def shards_first(folder):
            index_file = folder / INDEX
            return read_sharded(index_file) if index_file.is_file() else read_index(folder)

        monkeypatch.setattr("foreroute.loading.checkpoint.read_index", shards_first)
        first = verified(folder_of_two, "--reference", kind, expect=1)["first_difference"]
        assert (first["part"], first["moe_layer"], first["step"]) == ("dense", 0, 1)
        assert "model.embed_tokens.weight" in first["tensors"]

    @pytest.mark.parametrize("kind", ["resident", "on-demand"])
    def test_experts_of_other_files_than_dense_weights(self, verified, folder_of_two, monkeypatch, kind):
        """Dense weights of the one, experts of the other."""
        placing = engines.place

        def from_shards(asked, table, *rest):
            index_file = table.index.folder / INDEX
            if index_file.is_file():
                others = outline(table.index.folder, read_sharded(index_file)).table
                table = others.reordered([layer.name for layer in table.layers])
            return placing(asked, table, *rest)

        monkeypatch.setattr(engines, "place", from_shards)
        first = verified(folder_of_two, "--reference", kind, expect=1)["first_difference"]
        assert (first["part"], first["moe_layer"], first["step"]) == ("experts", 0, 1)
        assert first["experts"]

    def test_other_tokens_are_counted(self, verified, checkpoints, misread):
        """One bit is a difference; how many tokens are others is told beside it."""
        misread(checkpoints.get("qwen3_moe"), EXPERT, OTHER)
        answer = verified("qwen3_moe", expect=1)
        assert not answer["same"]
        assert answer["same_tokens"] <= answer["tokens"] == 16


class TestReference:
    def test_on_demand_where_the_whole_model_does_not_fit(self, verified, run, checkpoints, monkeypatch):
        monkeypatch.setattr(reference, "available_ram", lambda: 2**31)
        assert verified("qwen3_moe", expect=0)["reference"] == "on-demand"
        monkeypatch.setattr(reference, "available_ram", lambda: 1000)
        ran = run("verify", checkpoints.get("qwen3_moe"), "--reference", "resident")
        assert ran.code == 2
        assert "Take --reference on-demand" in ran.err

    def test_logits_that_are_no_numbers_prove_nothing(self, run, checkpoints, monkeypatch):
        load_resident = reference._load_resident

        def broken(*args):
            model = load_resident(*args)
            torch.nn.init.constant_(model.lm_head.weight, torch.nan)
            return model

        monkeypatch.setattr(reference, "_load_resident", broken)
        ran = run("verify", checkpoints.get("qwen3_moe"), *FAST)
        assert ran.code == 2
        assert "not numbers" in ran.err


class TestMemory:
    def test_a_quarter_that_holds_less_than_a_token_needs(self, verified, tmp_path):
        config = FAMILIES["qwen3_moe"]()
        config.num_experts_per_tok = 6
        folder = save_checkpoint(random_model(config, seed=0), tmp_path / "wide")
        save_tokenizer(folder)
        plan = verified(folder, expect=0)["plan"]
        assert plan["num_slots"] == plan["token_demand_slots"] == 18 > plan["total_slots"] // 4

    def test_too_little_that_was_asked_for_is_an_error_before_work(self, run, checkpoints, monkeypatch):
        monkeypatch.setattr(reference, "_load_resident", None)
        folder = checkpoints.get("qwen3_moe")
        ran = run("verify", folder, "--memory", slots_memory(folder, 3))
        assert ran.code == 2
        assert "Raise --memory" in ran.err

    def test_a_run_in_which_nothing_was_prefetched_says_so(self, run, checkpoints):
        ran = run("verify", checkpoints.get("qwen3_moe"), "--tokens", "1", "--threads", "1")
        assert ran.code == 0, ran.err
        assert "no prefetch was used: this run proves little" in ran.out


class TestBadInput:
    @pytest.fixture(autouse=True)
    def without_work(self, monkeypatch):
        monkeypatch.setattr(reference, "_load_resident", None)
        monkeypatch.setattr(reference, "load", None)

    @pytest.mark.parametrize(
        ("content", "fragment"),
        [
            (b"", "is empty"),
            (b"\n \n", "is empty"),
            (b"caf\xe9", "is not UTF-8 text (byte 3)"),
            (b"short\n" + b"x" * 193, "Prompt 2 has 193 tokens; the model's context holds 192"),
        ],
    )
    def test_prompts(self, run, checkpoints, tmp_path, content, fragment):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        ran = run("verify", checkpoints.get("qwen3_moe"), "--prompts", path)
        assert ran.code == 2
        assert fragment in ran.err

    def test_absent_things(self, run, checkpoints, tmp_path):
        ran = run("verify", checkpoints.get("qwen3_moe"), "--prompts", tmp_path / "absent.txt")
        assert ran.code == 2
        assert "cannot be read" in ran.err
        assert run("verify", tmp_path / "no-model").code == 2
        assert run("verify", checkpoints.get("qwen3_moe"), "--packed", tmp_path / "absent").code == 2

    @pytest.mark.parametrize("flags", [("--tokens", "0"), ("--reference", "guess"), ("--policy", "speculative")])
    def test_flags(self, run, checkpoints, flags):
        assert run("verify", checkpoints.get("qwen3_moe"), *flags).code == 2


def test_lines_are_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\r\n\n  two \u2028 still two\nthree".encode())
    assert verify.read_prompts(path) == ["one", "  two \u2028 still two", "three"]


def test_a_prompt_that_fills_the_context_gets_one_token(verified, prompts):
    prompts.write_text("x" * 192 + "\nshort\n")
    assert verified("qwen3_moe", expect=0)["tokens"] == 1 + 8


def test_ctrl_c_ends_it_and_leaves_no_reader(run, checkpoints, monkeypatch):
    compute, calls, before = MoeStep.compute, [], set(threading.enumerate())

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(MoeStep, "compute", interrupted)
    assert run("verify", checkpoints.get("qwen3_moe"), *FAST).code == 130
    assert not [one for one in threading.enumerate() if one.name.startswith("foreroute") and one not in before]
