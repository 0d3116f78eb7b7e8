"""The commands on an encoder-decoder: what works, and what is refused before work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.cli.main import main
from foreroute.verification.compare import differing
from foreroute.verification.transcript import ForwardPass, LayerPass
from tests.support.seq2seq import FIRST_SENTINEL, PROMPT, nllb_config, save_seq2seq, switch_config, write

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], _torch_setup: None) -> Run:
    """Run a command in this process: its code, output and errors."""

    def run_command(*args: str | Path) -> tuple[int, str, str]:
        threads = torch.get_num_threads()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as ended:
            code = int(ended.code or 0)
        torch.set_num_threads(threads)
        return (code, *capfd.readouterr())

    return run_command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Some lines of text."""
    file = tmp_path / "text.txt"
    file.write_text("".join(f"Line {at}: {at * 7919 % 1000} of {at * 104729 % 1000}.\n" for at in range(120)))
    return file


def test_generate_gives_the_prompt_to_the_encoder(run: Run, switch: Path, resident_of: Any) -> None:
    """The tokens of transformers' model for the same text; figures per token of the decoder's steps."""
    code, out, _ = run("generate", switch, "A <extra_id_0> of it", "--max-new-tokens", "6", "--json", "--memory", "40%")
    assert code == 0
    found = json.loads(out)
    ids = torch.tensor([[*b"A ", FIRST_SENTINEL, *b" of it", 258]])
    assert found["figures"]["prompt_tokens"] == ids.shape[1]
    expected = write(resident_of("switch_transformers"), _bytes_as_ids(ids), max_new_tokens=6, eos_token_id=258)
    assert list(found["token_ids"]) == expected.tokens[0, 1:].tolist()
    assert found["plan"]["num_layers"] == 6


def _bytes_as_ids(ids: torch.Tensor) -> torch.Tensor:
    from tokenizers import pre_tokenizers

    order = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = {**{byte: chr(byte) for byte in range(33, 127)}, 32: "\u0120"}
    return torch.tensor([[order[letters[one]] if one < 256 else one for one in ids[0].tolist()]])


def test_plan_pack_and_verify(run: Run, switch: Path, tmp_path: Path) -> None:
    """The plan counts the layers of both sides; a packed store holds their experts; both are verified."""
    folder = Path(shutil.copytree(switch, tmp_path / "model"))
    code, out, _ = run("plan", folder, "--json")
    assert code == 0
    planned = json.loads(out)["plan"]
    assert (planned["num_layers"], planned["token_demand_slots"]) == (6, 3)
    code, out, _ = run("pack", folder, "--json")
    assert code == 0
    for packed in ("auto", "no"):
        code, out, errors = run("verify", folder, "--packed", packed, "--tokens", "6", "--json", "--memory", "30%")
        assert code == 0, errors
        found = json.loads(out)
        assert found["same"] is True
        assert found["reference"] == "resident"


def test_verify_takes_no_reference_that_is_wrong(run: Run, folder_of: Any) -> None:
    """NLLB-MoE is compared with on-demand loading: transformers' own model does not compute what its router chooses."""
    code, out, errors = run("verify", folder_of("nllb-moe"), "--tokens", "4", "--json", "--memory", "30%")
    assert code == 0, errors
    found = json.loads(out)
    assert (found["same"], found["reference"]) == (True, "on-demand")
    code, _, errors = run("verify", folder_of("nllb-moe"), "--reference", "resident")
    assert code == 2
    assert "passes them all through experts 0 and 1" in errors


def test_fit_and_score(run: Run, switch: Path, tmp_path: Path, text: Path) -> None:
    """Predictors are fitted to text with gaps; the next sparse layer's router is scored, and the decoder's first."""
    folder = Path(shutil.copytree(switch, tmp_path / "model"))
    flags = ("--context", "48", "--tokens", "1500", "--json")
    code, _, errors = run("fit", folder, "--text", text, *flags)
    assert code == 0, errors
    code, out, errors = run("score", folder, "--text", text, *flags, "--decode", "64")
    assert code == 0, errors
    found = json.loads(out)["predictors"]
    assert found["oracle"]["recall_k"] == [1.0] * 6
    # Layers 0 to 2 are the encoder's, 3 to 5 the decoder's: nothing guesses the first of either from a layer before.
    guessed = [value is not None for value in found["lookahead"]["recall_k"]]
    assert guessed == [False, True, True, False, True, True]
    assert [value is not None for value in found["token table"]["recall_k"]] == [False] * 3 + [True] + [False] * 2
    assert found["ridge"]["mean"]["recall_k"] > found["random"]["mean"]["recall_k"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("chat",), "is an encoder-decoder. It answers one text, and no chat"),
        (("generate", "hello", "--chat"), "is an encoder-decoder. It answers one text, and no chat"),
        (("generate", "hello", "--system", "Be brief."), "leave --chat and --system out"),
        (("eval", "--text", __file__), "is an encoder-decoder. eval scores"),
        (("bench", "--quick"), "is an encoder-decoder. bench feeds"),
    ],
)
def test_refused_by_name(run: Run, switch: Path, command: tuple[str, ...], said: str) -> None:
    """Before the model is loaded."""
    name, *rest = command
    code, _, errors = run(name, switch, *rest)
    assert code == 2
    assert said in errors


def test_policies_after_a_fit(run: Run, switch: Path, tmp_path: Path, text: Path, load: Any) -> None:
    """The decoder substitutes missing experts past its first MoE layer; the encoder, as a prompt, never does."""
    folder = Path(shutil.copytree(switch, tmp_path / "model"))
    assert run("fit", folder, "--text", text, "--context", "48", "--tokens", "1500", "--json")[0] == 0
    model = load(folder, "25%", policy="speculative")
    substituted: set[int] = set()
    pool = model.foreroute.host_engine.pool
    substitute = pool.substitute

    def note(keys: Any) -> None:
        substituted.update(pool.keys.expert_id(key)[0] for key in keys)
        substitute(keys)

    pool.substitute = note
    write(model, PROMPT, max_new_tokens=24)
    assert substituted
    assert substituted <= {4, 5}
    assert model.foreroute.stats().prefill.substituted == 0


def test_quantised_experts(run: Run, tmp_path: Path) -> None:
    """Packed to blocks, which ggml multiplies: verified, also in the steps that pass the decoder's layers alone."""
    folder = save_seq2seq(switch_config(d_ff=64), tmp_path / "model")
    code, _, errors = run("pack", folder, "--quant", "q8_0", "--json")
    assert code == 0, errors
    code, out, errors = run("verify", folder, "--tokens", "4", "--json", "--memory", "100%", "--packed", "q8_0")
    assert code == 0, out + errors
    found = json.loads(out)
    assert found["same"] is True
    assert found["plan"]["math"] == "ggml"


def test_scaled_outputs_are_dequantised_by_torch(run: Run, tmp_path: Path, load: Any) -> None:
    """NLLB-MoE's blocks are not for ggml, which has no such scale; and the answer stays near that of the numbers."""
    folder = save_seq2seq(nllb_config(encoder_ffn_dim=64, decoder_ffn_dim=64), tmp_path / "model")
    assert run("pack", folder, "--quant", "q8_0", "--json")[0] == 0
    model = load(folder, "100%", packed="q8_0")
    assert model.foreroute.plan.math == "own"
    assert "its outputs are scaled" in model.foreroute.plan.math_note
    exact = write(load(folder, "100%"))
    torch.testing.assert_close(write(model).logits[0], exact.logits[0], atol=0.5, rtol=0)


def test_a_decoder_step_s_difference_is_that_of_its_layer() -> None:
    """Such a step passes some of the model's MoE layers: the layer's number is that of its module."""
    passes = [LayerPass("decoder", b"in", b"ids", output, (0,), ()) for output in (b"out", b"else")]
    left, right = (ForwardPass((one,), b"logits", 0, False) for one in passes)
    assert differing(left, right, ["encoder", "decoder"]) == ("experts", 1)
    assert differing(left, left._replace(logits=b"others"), ["encoder", "decoder"]) == ("head", 2)
