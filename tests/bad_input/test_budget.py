"""Memory budgets that cannot work, and what the message says instead."""

import re

import pytest

from foreroute.errors import BudgetError, ForerouteError
from foreroute.memory import host
from foreroute.memory.host import Ram
from tests.support.checkpoints import save_hollow
from tests.support.families import FAMILIES
from tests.support.runs import ONE_PROMPT, assert_same_bits, expert_table, generate, slots_memory, watch_reads


@pytest.fixture
def folder(checkpoints):
    return checkpoints.get("mixtral")


def refused(load, folder, memory, **options):
    with watch_reads() as reads, pytest.raises(BudgetError) as caught:
        load(folder, memory, **options)
    assert not reads.paths
    return str(caught.value)


@pytest.mark.parametrize("num_slots", [1, 9])
def test_below_one_tokens_demand(load, references, folder, num_slots):
    """The number that the message names is enough."""
    message = refused(load, folder, slots_memory(folder, num_slots))
    assert f"holds {num_slots} slot" in message
    assert "one token needs 10" in message
    (enough,) = re.findall(r"Raise memory= to ([\d.]+ [KMG]iB)\.", message)
    model = load(folder, enough)
    assert 10 <= model.foreroute.plan.num_slots <= 11
    assert_same_bits(generate(model), references.output(folder, ONE_PROMPT))


def test_the_number_that_is_enough_is_rounded_up(load, tmp_path):
    config = FAMILIES["qwen3_moe"]()
    config.hidden_size = config.moe_intermediate_size = 200
    folder = save_hollow(config, tmp_path / "model")
    assert slots_memory(folder, 9) == 2_174_976  # 2.07 MiB: 2.1 is enough, 2.0 is not
    assert "Raise memory= to 2.1 MiB." in refused(load, folder, "1MiB")
    assert load(folder, "2.1 MiB").foreroute.plan.num_slots == 9
    refused(load, folder, "2.0 MiB")


@pytest.mark.parametrize("memory", ["4096", "10KB", "2%", "1B"])
def test_less_than_that(load, folder, memory):
    assert "one token needs 10" in refused(load, folder, memory)


@pytest.mark.parametrize(
    "memory",
    ["lots", "-1", "0", "150%", "", " ", "8 apples", "1e9", "GiB", "8GiB 8GiB", "nan", "-5%", 0, -7, True, 1.5],
)
def test_nonsense(load, folder, memory):
    message = refused(load, folder, memory)
    assert repr(memory) in message
    assert '"8GiB"' in message
    assert '"25%"' in message


@pytest.mark.parametrize("memory", ["1000TiB", 10**18])
def test_more_than_there_is(load, folder, memory):
    message = refused(load, folder, memory)
    assert str(memory) in message
    assert "this machine's RAM" in message
    assert "GiB" in message


def test_more_than_there_is_for_a_larger_model(load, folder, monkeypatch):
    """All experts would fit the budget, and not the RAM."""
    monkeypatch.setattr(host, "ram", lambda: Ram(400 * 2**10, 2**30, None))
    message = refused(load, folder, "100%")
    assert "400.0 KiB" in message
    assert "Leave memory= out" in message


def test_more_than_the_container_has(load, folder, monkeypatch):
    """What the machine has is of no use there: the kernel would end the process."""
    monkeypatch.setattr(host, "ram", lambda: Ram(400 * 2**10, 2**30, "memory.max of its control group"))
    message = refused(load, folder, "100%")
    assert "the RAM that this process may use (400.0 KiB, by memory.max of its control group)" in message


def test_left_out_it_is_chosen(load, folder):
    plan = load(folder, None).foreroute.plan
    assert plan.memory_was_chosen
    assert plan.num_slots == plan.total_slots
    assert plan.memory_bytes == expert_table(folder).total_slots * plan.slot_bytes


def test_left_out_with_no_ram_left(load, folder, monkeypatch):
    monkeypatch.setattr(host, "ram", lambda: Ram(2**40, 2**30, None))
    message = refused(load, folder, None)
    assert "one token needs 10" in message
    assert "a container's" in message
    (enough,) = re.findall(r"memory=\"(\S+)\"\.", message)
    assert load(folder, enough).foreroute.plan.num_slots >= 10


def test_what_does_not_fit_beside_keys_and_values(load, folder, monkeypatch):
    """Refused before an expert is read, with what would fit; what is advised then fits."""
    monkeypatch.setattr(host, "ram", lambda: Ram(2**40, 2**30, None))
    message = refused(load, folder, "100%", kv_tokens=2**22)
    assert "1.0 GiB are free" in message
    tokens = re.search(r"kv_tokens= to (\d+)", message)
    assert tokens is not None
    plan = load(folder, "100%", kv_tokens=int(tokens[1])).foreroute.plan
    assert plan.num_slots == plan.total_slots
    # Even without them: before the dense weights are read.
    monkeypatch.setattr(host, "ram", lambda: Ram(2**40, 2**14, None))
    monkeypatch.setattr("foreroute.loading.load.load_skeleton", lambda *args: pytest.fail("weights were read"))
    assert "This takes" in refused(load, folder, "100%", kv_tokens=16)


def test_keys_and_values_are_measured_without_experts(load, folder):
    from foreroute.memory.serving import kv_bytes_per_token

    model = load(folder, "100%", kv_tokens=64)
    assert model.foreroute.plan.kv_bytes_per_token == kv_bytes_per_token(model) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"eviction": "mru"},
        {"prefetch": "oracle"},
        {"prefetch_width": 0},
        {"reader_threads": 0},
        {"reader_threads": 99},
        {"dtype": "int3"},
    ],
    ids=str,
)
def test_switches_that_do_not_exist(load, folder, options):
    with watch_reads() as reads, pytest.raises(ForerouteError) as caught:
        load(folder, **options)
    ((name, value),) = options.items()
    assert name in str(caught.value)
    assert str(value) in str(caught.value)
    assert re.search("[Cc]hoose|at least", str(caught.value))
    assert not reads.paths


def test_a_switch_of_another_name(folder):
    from foreroute import EngineConfig

    with pytest.raises(TypeError, match="memori"):
        EngineConfig(memori="8GiB")
