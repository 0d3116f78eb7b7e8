"""Decoder layers in graphs: taken where their numbers are the family's own, and left where anything else is asked."""

from typing import Any

import pytest
import torch

from foreroute.errors import RefusedError
from foreroute.model.decode import layers as decode_layers
from foreroute.model.decode.routes import RoutedExperts
from foreroute.model.hooks import ResidualTap
from tests.formats.gguf_writer import Kind, Written, write_gguf
from tests.loading.test_decode_attention import decoded

ARCHITECTURES = ("qwen3moe", "gpt-oss")
# Products round their inputs to 8 bits, by what may differ in its last.
MOST_DIFFERENCE = 5e-3


@pytest.fixture(scope="module")
def written(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """Dense weights in blocks, which graphs multiply."""
    return {name: write_gguf(tmp_path_factory.mktemp(name), name, Kind.Q8_0, dense=Kind.Q8_0) for name in ARCHITECTURES}


def fused_layers(model: Any) -> list[Any]:
    layers = [layer.__dict__.get("forward") for layer in model.get_decoder().layers]
    return [one for one in layers if isinstance(one, decode_layers._FusedLayer)]


def loaded_plain(load: Any, path: Any, monkeypatch: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr("foreroute.loading.block_kernels.fuse_layers", lambda model, products: 0)
        model = load(path, "100%")
    assert not fused_layers(model)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_graphs_are_near_the_family_s_own_layers(name: str, written: Any, load: Any, monkeypatch: Any) -> None:
    model = load(written[name].path, "100%")
    computed, compute = [], decode_layers._FusedLayer.compute

    def noting(self: Any, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        computed.append(hidden_states.shape)
        return compute(self, hidden_states, **given)

    monkeypatch.setattr(decode_layers._FusedLayer, "compute", noting)
    assert len(fused_layers(model)) == model.config.num_hidden_layers
    ours = decoded(model, None)
    assert len(computed) == (len(ours) - 1) * model.config.num_hidden_layers, "decoding alone"
    assert all(fused._router is not None for fused in fused_layers(model))
    theirs = decoded(loaded_plain(load, written[name].path, monkeypatch), None)
    assert float((ours - theirs).norm() / theirs.norm()) < MOST_DIFFERENCE


def test_a_tap_of_the_residual_stream_hears_it(written: Any, load: Any, monkeypatch: Any) -> None:
    heard = []
    for model in (
        load(written["qwen3moe"].path, "100%"),
        loaded_plain(load, written["qwen3moe"].path, monkeypatch),
    ):
        layers = model.foreroute.layers
        tap = ResidualTap([layer.norm for layer in layers])
        decoded(model, None)
        heard.append(tap(layers[-1].index))
        tap.remove()
    assert heard[0] is not None
    assert heard[0].shape == (2, model.config.hidden_size)
    assert float((heard[0] - heard[1]).norm() / heard[1].norm()) < MOST_DIFFERENCE


def test_attention_weights_that_were_asked_for_come_from_the_family_s_own_code(written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%", attn_implementation="eager")
    assert fused_layers(model)
    prompt = torch.tensor([[5, 17, 42]])
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        again = model(torch.tensor([[9]]), past_key_values=out.past_key_values, output_attentions=True)
    assert [tuple(one.shape[-2:]) for one in again.attentions] == [(1, 4)] * model.config.num_hidden_layers


def test_a_family_of_another_form_keeps_its_own_layers(written: Any, load: Any, monkeypatch: Any) -> None:
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    own = modeling_qwen3_moe.Qwen3MoeDecoderLayer.forward

    def other(self: Any, *args: Any, **given: Any) -> Any:
        return 1.01 * own(self, *args, **given)

    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeDecoderLayer, "forward", other)
    assert not fused_layers(load(written["qwen3moe"].path, "100%"))


def test_layers_of_other_settings_are_compared_by_themselves(written: Any, load: Any, monkeypatch: Any) -> None:
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    own, init = modeling_qwen3_moe.Qwen3MoeAttention.forward, modeling_qwen3_moe.Qwen3MoeAttention.__init__

    def with_setting(self: Any, config: Any, layer_idx: int) -> None:
        init(self, config, layer_idx)
        self.use_rope = layer_idx != 1

    def other(self: Any, hidden_states: Any, position_embeddings: Any, *args: Any, **given: Any) -> Any:
        if not self.use_rope:
            position_embeddings = tuple(
                torch.full_like(one, at) for at, one in zip((1, 0), position_embeddings, strict=True)
            )
        return own(self, hidden_states, position_embeddings, *args, **given)

    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeAttention, "__init__", with_setting)
    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeAttention, "forward", other)
    model = load(written["qwen3moe"].path, "100%")
    fused = ["forward" in layer.__dict__ for layer in model.get_decoder().layers]
    assert fused == [at != 1 for at in range(model.config.num_hidden_layers)]


@torch.no_grad()
def decode_three(model: Any, **given: Any) -> torch.Tensor:
    """Logits of three tokens after a prompt of three."""
    out = model(torch.tensor([[5, 17, 42]], device="cpu"), use_cache=True)
    logits = []
    for token in (9, 8, 7):
        out = model(torch.tensor([[token]], device="cpu"), past_key_values=out.past_key_values, use_cache=True, **given)
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("name", ["o_proj", "q_norm", "input_layernorm", "post_attention_layernorm"])
def test_hooks_of_replaced_modules_are_called(name: str, written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    layer, heard = model.get_decoder().layers[1], []
    module = getattr(layer, name, None) or getattr(layer.self_attn, name)
    handle = module.register_forward_pre_hook(lambda module, args: heard.append(args[0].shape[1]))
    decode_three(model)
    handle.remove()
    assert heard == [3, 1, 1, 1]


def test_replaced_experts_are_called(written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    before = decode_three(model)
    layer = model.get_decoder().layers[1]
    own, calls = layer.mlp, []

    class Wrapper(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            calls.append(x.shape[1])
            return own(x)

    layer.mlp = Wrapper()
    after = decode_three(model)
    layer.mlp = own
    assert calls == [3, 1, 1, 1]
    assert float((after - before).norm() / before.norm()) < MOST_DIFFERENCE


def test_another_default_device_changes_nothing(written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    before = decode_three(model)
    model = load(written["qwen3moe"].path, "100%")
    token = model.get_decoder().layers[0].__dict__["forward"]
    hidden = torch.zeros(1, 1, model.config.hidden_size) + 0.5
    angles = model.get_decoder().rotary_emb(hidden, torch.tensor([[0]]))
    with torch.device("meta"), torch.no_grad():
        out = token._graphs_of(1, angles[0].shape[-1])[0].run(hidden, angles[0][0], angles[1][0])
    assert all(one.device.type == "cpu" for one in out)
    assert torch.equal(decode_three(model), before)


def test_models_of_one_form_have_attention_of_their_own(written: Any, load: Any) -> None:
    models = [load(written["qwen3moe"].path, "100%") for _ in range(2)]
    own = [
        {id(layer.self_attn.__dict__["_foreroute_of_token"]) for layer in one.get_decoder().layers} for one in models
    ]
    assert [len(one) for one in own] == [1, 1]
    assert own[0] != own[1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_graph_up_to_the_experts_has_the_bits_of_its_parts(
    name: str, written: Any, load: Any, monkeypatch: Any
) -> None:
    model = load(written[name].path, "100%")
    ran, run = [], decode_layers.LayerGraph.run
    monkeypatch.setattr(decode_layers.LayerGraph, "run", lambda *given: ran.append(0) or run(*given))
    whole = decode_three(model)
    assert len(ran) == 3 * model.config.num_hidden_layers
    monkeypatch.setattr(decode_layers._FusedLayer, "_compute_whole", lambda *given: None)
    assert torch.equal(decode_three(model), whole)
    assert len(ran) == 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_graphs_choose_experts_as_the_family_s_routers_do(name: str, written: Any, load: Any, monkeypatch: Any) -> None:
    model = load(written[name].path, "100%")
    assert all(fused._routed is not None for fused in fused_layers(model))
    calls, compute = [], RoutedExperts.__call__
    monkeypatch.setattr(RoutedExperts, "__call__", lambda *given: calls.append(1) or compute(*given))
    ours = decode_three(model)
    assert len(calls) == 3 * model.config.num_hidden_layers
    monkeypatch.setattr("foreroute.model.decode.layers.routed_experts", lambda *given: None)
    by_module = load(written[name].path, "100%")
    assert all(fused._routed is None for fused in fused_layers(by_module))
    theirs = decode_three(by_module)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4, "the same experts and weights, but for rounding"


def test_a_router_of_another_form_is_called_itself(written: Any, load: Any, monkeypatch: Any) -> None:
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    own = modeling_qwen3_moe.Qwen3MoeTopKRouter.forward

    def scaled(self: Any, hidden_states: torch.Tensor) -> Any:
        logits, weights, ids = own(self, hidden_states)
        return logits, 1.5 * weights, ids

    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeTopKRouter, "forward", scaled)
    model = load(written["qwen3moe"].path, "100%")
    assert fused_layers(model)
    assert all(fused._routed is None for fused in fused_layers(model))


@pytest.mark.parametrize("name", ["gate", "experts"])
def test_hooks_within_a_moe_block_are_called(name: str, written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    before, heard = decode_three(model), []
    block = model.get_decoder().layers[1].mlp
    handle = getattr(block, name).register_forward_hook(lambda module, args, out: heard.append(len(args[0])))
    after = decode_three(model)
    handle.remove()
    assert heard == [3, 1, 1, 1]
    assert float((after - before).norm() / before.norm()) < MOST_DIFFERENCE


def test_another_attention_function_is_called(written: Any, load: Any, monkeypatch: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    model.set_attn_implementation("eager")
    asked, own = [], decode_layers.function_of
    monkeypatch.setattr(decode_layers, "function_of", lambda module, name: asked.append(name) or own(module, name))
    decode_three(model)
    assert asked == ["eager"] * 3 * model.config.num_hidden_layers


def test_closed_experts_say_so(written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    decode_three(model)
    model.foreroute.close()
    with pytest.raises(RefusedError, match="closed"):
        decode_three(model)


class Passing(torch.nn.Module):
    """A module in another's place, which counts the calls that it passes on."""

    def __init__(self, own: torch.nn.Module, heard: list[int]) -> None:
        super().__init__()
        self._modules["own"], self._heard = own, heard
        self.out_features = getattr(own, "out_features", 0)
        self.weight = getattr(own, "weight", None)

    def forward(self, *args: torch.Tensor) -> Any:
        self._heard.append(args[0].shape[1] if args[0].ndim == 3 else args[0].shape[0])
        return self._modules["own"](*args)


@pytest.mark.parametrize(
    "name",
    ["mlp.gate", "mlp.experts", "self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "input_layernorm"],
)
def test_modules_replaced_after_load_are_called(name: str, written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    before, heard = decode_three(model), list[int]()
    layer = model.get_decoder().layers[1]
    parent = layer.get_submodule(name.rpartition(".")[0])
    last = name.rpartition(".")[2]
    setattr(parent, last, Passing(getattr(parent, last), heard))
    after = decode_three(model)
    assert heard == [3, 1, 1, 1]
    assert float((after - before).norm() / before.norm()) < MOST_DIFFERENCE


@pytest.mark.parametrize("name", ["mlp.gate", "mlp.experts", "mlp", "self_attn"])
def test_forwards_replaced_after_load_are_called(name: str, written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    decode_three(model)
    module, heard = model.get_decoder().layers[1].get_submodule(name), []
    own = module.forward

    def hearing(*args: Any, **given: Any) -> Any:
        heard.append(1)
        return own(*args, **given)

    module.forward = hearing
    decode_three(model)
    assert len(heard) == 4


def turn_router(gate: Any) -> None:
    gate.weight = torch.nn.Parameter(-gate.weight.detach().as_subclass(torch.Tensor), requires_grad=False)


def choose_one(gate: Any) -> None:
    gate.top_k = 1


@pytest.mark.parametrize("change", [turn_router, choose_one])
def test_routers_changed_after_load_are_obeyed(change: Any, written: Any, load: Any, monkeypatch: Any) -> None:
    found = []
    for model in (
        load(written["qwen3moe"].path, "100%"),
        loaded_plain(load, written["qwen3moe"].path, monkeypatch),
    ):
        before = decode_three(model)
        change(model.get_decoder().layers[1].mlp.gate)
        found.append(decode_three(model))
        assert not torch.equal(found[-1], before)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < MOST_DIFFERENCE


def test_hooks_of_all_modules_are_called(written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    decode_three(model)
    heard: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: heard.append(type(module).__name__)
    )
    decode_three(model)
    handle.remove()
    for name in ("TopKRouter", "Experts", "SparseMoeBlock", "Attention"):
        assert heard.count(f"Qwen3Moe{name}") == 4 * model.config.num_hidden_layers


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_begun_in_inference_mode_goes_on_outside(rows: int, written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    prompt, token = torch.tensor([[5, 17, 42]] * rows), torch.tensor([[9]] * rows)
    with torch.inference_mode():
        out = model(prompt, use_cache=True)
        out = model(token, past_key_values=out.past_key_values)
    with torch.no_grad():
        again = model(token, past_key_values=out.past_key_values).logits
        out = model(prompt, use_cache=True)
        for _ in range(2):
            out = model(token, past_key_values=out.past_key_values)
    assert torch.equal(again, out.logits)


def test_a_row_does_not_go_on_a_cache_of_two(written: Any, load: Any) -> None:
    model = load(written["qwen3moe"].path, "100%")
    with torch.no_grad():
        out = model(torch.tensor([[5, 17, 42]] * 2), use_cache=True)
        with pytest.raises(RuntimeError):
            model(torch.tensor([[9]]), past_key_values=out.past_key_values)
