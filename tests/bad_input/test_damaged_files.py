"""Files beside the weights that are not what their names say: each is named, with what mends it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import foreroute
from benchmarks.spoilt_files import KINDS, POINTER
from foreroute.checkpoint.records import STORE_NAME
from foreroute.errors import CheckpointError, CorruptCheckpointError, ForerouteError, PromptError
from foreroute.model.text import encode_prompt, load_tokenizer
from foreroute.prepare.pack import pack
from tests.support.broken import change_header, copied, read_parts, write_parts
from tests.support.checkpoints import edit_json
from tests.support.runs import expert_table

NESTED = "[" * 100_000 + "]" * 100_000
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Refused = Callable[..., str]


@pytest.fixture
def folder(checkpoints: Any, tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file."""
    return copied(checkpoints.get("qwen3_moe"), tmp_path / "model")


@pytest.fixture
def sharded(checkpoints: Any, tmp_path: Path) -> Path:
    """A copy of one in several."""
    return copied(checkpoints.get("qwen3_moe", sharded=True), tmp_path / "model")


def refused(act: Callable[[], Any], *patterns: str, kind: type[ForerouteError] = CheckpointError) -> None:
    """The call fails with one line of ours that says all this."""
    with pytest.raises(kind) as caught:
        act()
    said = str(caught.value)
    assert "\n" not in said
    for pattern in patterns:
        assert re.search(pattern, said), f"{pattern!r} is not in: {said}"


def chat_ids(folder: Path) -> Any:
    return encode_prompt(load_tokenizer(folder), "hello", chat=True)


class TestPointers:
    """What a clone without git-LFS leaves."""

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
    def test_of_what_load_reads(self, folder: Path, name: str) -> None:
        (folder / name).write_bytes(POINTER)
        refused(
            lambda: foreroute.load(folder),
            rf"{name} is a git-LFS pointer",
            "123,456 bytes",
            "git lfs pull",
            str(folder),
        )

    @pytest.mark.parametrize("pattern", ["model.safetensors.index.json", "model-00002-of-*.safetensors"])
    def test_of_shards_and_their_index(self, sharded: Path, pattern: str) -> None:
        (path,) = sharded.glob(pattern)
        path.write_bytes(POINTER)
        refused(lambda: foreroute.load(sharded), rf"{path.name} is a git-LFS pointer", "git lfs pull")

    @pytest.mark.parametrize(
        "name",
        ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
         "additional_chat_templates/tools.jinja", "tokenizer.model", "merges.txt"],
    )  # fmt: skip
    def test_of_what_a_tokenizer_reads(self, folder: Path, name: str) -> None:
        """A template's pointer was the prompt's text."""
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(POINTER)
        refused(lambda: chat_ids(folder), rf"{name} is a git-LFS pointer", "git lfs pull")

    @pytest.mark.parametrize("name", [STORE_NAME, "predictor.foreroute.safetensors"])
    def test_of_what_foreroute_wrote(self, folder: Path, name: str) -> None:
        (folder / name).write_bytes(POINTER)
        refused(lambda: foreroute.load(folder), rf"{name} is a git-LFS pointer", "git lfs pull", kind=ForerouteError)

    def test_of_a_gguf_file(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        (tmp_path / "model.gguf").write_bytes(POINTER)
        refused(lambda: foreroute.load(tmp_path / "model.gguf"), r"model\.gguf is a git-LFS pointer", "git lfs pull")

    def test_a_text_that_speaks_of_pointers_is_none(self, folder: Path, tmp_path: Path) -> None:
        from foreroute.whole_files import read_text

        text = "In git-LFS a file begins with:\n" + POINTER.decode()
        (tmp_path / "text").write_text(text, encoding="utf-8")
        assert read_text(tmp_path / "text") == text


class TestGenerationConfig:
    """transformers goes on without it, and the tokens that end an answer are lost."""

    @pytest.mark.parametrize("content", ['{"eos_token_id": [25', "", "[]", "null", NESTED, '{"top_p": NaN}'])
    def test_cut_off_or_another_thing(self, folder: Path, content: str) -> None:
        (folder / "generation_config.json").write_text(content, encoding="utf-8")
        refused(lambda: foreroute.load(folder), r"generation_config\.json is not a JSON object", "Download it again")

    @pytest.mark.parametrize(
        ("key", "value"),
        [("eos_token_id", "</s>"), ("eos_token_id", [2, "x"]), ("eos_token_id", 2**62), ("temperature", "hot"),
         ("top_k", 0.5), ("top_p", 7), ("do_sample", "yes"), ("max_new_tokens", 0), ("suppress_tokens", 5),
         ("temperature", 2), ("repetition_penalty", 2), ("typical_p", 0), ("top_h", 2)],
    )  # fmt: skip
    def test_a_value_that_means_nothing(self, folder: Path, key: str, value: Any) -> None:
        edit_json(folder / "generation_config.json", **{key: value})
        refused(lambda: foreroute.load(folder), r"generation_config\.json", f"{key} is", "it must be")

    @pytest.mark.parametrize(
        ("key", "value"), [("bad_words_ids", "x"), ("bad_words_ids", [5]), ("sequence_bias", 5),
                           ("exponential_decay_length_penalty", {})],
    )  # fmt: skip
    def test_a_value_that_transformers_makes_nothing_of(self, folder: Path, key: str, value: Any) -> None:
        edit_json(folder / "generation_config.json", **{key: value})
        refused(lambda: foreroute.load(folder), r"generation_config\.json is not accepted by transformers")

    def test_sampling_at_no_temperature(self, folder: Path) -> None:
        edit_json(folder / "generation_config.json", do_sample=True, temperature=0)
        refused(lambda: foreroute.load(folder), r"generation_config\.json", "temperature is 0")

    def test_a_whole_one_is_heeded(self, load: Any, folder: Path) -> None:
        edit_json(folder / "generation_config.json", eos_token_id=[7, 9], temperature=0.5, do_sample=True)
        settings = load(folder).generation_config
        assert (settings.eos_token_id[:2], settings.temperature) == ([7, 9], 0.5)


class TestConfig:
    @pytest.mark.parametrize(
        ("key", "value"),
        [("num_experts_per_tok", 0), ("num_experts_per_tok", -1), ("num_experts_per_tok", 2**62),
         ("num_experts_per_tok", 17), ("num_hidden_layers", 2**62), ("num_hidden_layers", 9999),
         ("num_local_experts", 2**62), ("num_local_experts", 90_000), ("max_position_embeddings", 0),
         ("eos_token_id", 2**62), ("eos_token_id", "</s>")],
    )  # fmt: skip
    def test_a_size_that_the_files_cannot_have(self, folder: Path, key: str, value: Any) -> None:
        """Some made lists of 2**62 layers, or a model as large, before any check."""
        edit_json(folder / "config.json", **{key: value})
        refused(lambda: foreroute.load(folder), r"config\.json", str(value))

    @pytest.mark.parametrize("value", [[], {}, "x", 1.5, True, None, -1, 0])
    @pytest.mark.parametrize(
        "key", ["hidden_size", "rope_parameters", "layer_types", "dtype", "hidden_act", "text_config"]
    )
    def test_another_type(self, folder: Path, key: str, value: Any) -> None:
        """Whatever comes of it: one line, or a model."""
        content = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), key: value}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
        for act in (load_tokenizer, foreroute.load):
            said = ""
            try:
                act(folder)
            except ForerouteError as error:
                said = str(error)
            assert not said or ("config.json" in said and "\n" not in said)

    def test_windows_that_hold_no_token(self, checkpoints: Any, tmp_path: Path) -> None:
        folder = copied(checkpoints.get("gpt_oss"), tmp_path / "model")
        edit_json(folder / "config.json", sliding_window=0)
        refused(lambda: foreroute.load(folder), r"config\.json", "sliding_window is 0")

    def test_numbers_that_make_nan(self, folder: Path) -> None:
        edit_json(folder / "config.json", rms_norm_eps=-1e3)
        refused(lambda: foreroute.load(folder), "NaN", r"config\.json")

    @pytest.mark.parametrize(
        "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                 "special_tokens_map.json", "model.safetensors.index.json"],
    )  # fmt: skip
    def test_json_nested_without_end(self, sharded: Path, name: str) -> None:
        (sharded / name).write_text('{"a": ' + NESTED + "}", encoding="utf-8")
        act = load_tokenizer if "token" in name else foreroute.load
        refused(lambda: act(sharded), name, "nested too deep")

    def test_dense_weights_of_another_shape_are_found_before_they_are_made(self, folder: Path) -> None:
        """transformers would make an embedding of that size anew, of random numbers, before it is refused."""
        edit_json(folder / "config.json", vocab_size=2**40)
        refused(lambda: foreroute.load(folder), "another shape than config.json says", str(2**40))


class TestHeaders:
    @pytest.mark.parametrize(
        ("key", "value"),
        [("dtype", []), ("dtype", {}), ("dtype", ""), ("dtype", 5), ("shape", {}), ("shape", [-1]), ("shape", [1.5, 2]),
         ("shape", [True]), ("shape", [2**62] * 40), ("shape", "x"), ("data_offsets", [1]), ("data_offsets", None),
         ("data_offsets", ["a", "b"]), ("data_offsets", [10, 0]), ("data_offsets", [0, 2**70])],
    )  # fmt: skip
    def test_a_tensor_that_is_described_wrongly(self, folder: Path, key: str, value: Any) -> None:
        name = "model.layers.0.input_layernorm.weight"
        change_header(folder / "model.safetensors", lambda header: header[name].update({key: value}))
        refused(lambda: foreroute.load(folder), r"model\.safetensors has a malformed header", re.escape(name))

    @pytest.mark.parametrize("value", [1, [], {"format": 1}, "x"])
    def test_metadata_that_are_none(self, folder: Path, value: Any) -> None:
        change_header(folder / "model.safetensors", lambda header: header.update(__metadata__=value))
        refused(lambda: foreroute.load(folder), r"model\.safetensors has a malformed header", "__metadata__")

    @pytest.mark.parametrize("many", [5_000, 270_000])
    def test_a_multitude_of_empty_tensors(self, folder: Path, many: int) -> None:
        header, payload = read_parts(folder / "model.safetensors")
        end = len(payload)
        header.update({f"empty.{at}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for at in range(many)})
        write_parts(folder / "model.safetensors", header, payload)
        refused(lambda: foreroute.load(folder), r"2?7?5?,?\d+ tensors", kind=CorruptCheckpointError)

    @pytest.mark.parametrize(
        "names", [{"a": "../elsewhere.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}, {"a": 5}, [], {}, {"a": "x\0y"}]
    )
    def test_an_index_that_names_no_files_of_its_folder(self, sharded: Path, names: Any) -> None:
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
        refused(lambda: foreroute.load(sharded), r"index\.json is not a safetensors index", kind=CorruptCheckpointError)

    @pytest.mark.parametrize(
        "change",
        [lambda header: [], lambda header: {**header, "codec": 5}, lambda header: {**header, "codec": "int9"},
         lambda header: {**header, "layers": None}, lambda header: {**header, "version": []},
         lambda header: {**header, "order": {}}, lambda header: {**header, "choice": 1}, lambda header: {}],
    )  # fmt: skip
    def test_a_store_whose_checksum_is_right_and_whose_header_is_not(self, folder: Path, change: Any) -> None:
        store, kind = folder / STORE_NAME, KINDS["store header"]
        pack(expert_table(folder), store, progress=lambda done, total: None)
        whole = store.read_bytes()
        changed = change(json.loads(kind.take(whole)))
        store.write_bytes(kind.put(whole, json.dumps(changed, sort_keys=True).encode()))
        refused(lambda: foreroute.load(folder), STORE_NAME, "foreroute pack", kind=ForerouteError)


class TestTokenizer:
    @pytest.mark.parametrize("content", ["", " \n", "{% for message in messages %}{{ message", "{% if x %}", "{{ 1 +"])
    def test_a_template_that_was_cut_off(self, folder: Path, content: str) -> None:
        (folder / "chat_template.jinja").write_text(content, encoding="utf-8")
        refused(
            lambda: load_tokenizer(folder), r"chat_template\.jinja", "Download it again", kind=CorruptCheckpointError
        )

    @pytest.mark.parametrize(
        "content",
        [5, ["x"], [{"name": "default"}], {"default": 5}, "{% for x in y %}", [{"name": "a", "template": "{{"}]],
    )
    def test_a_template_in_the_settings_that_is_none(self, folder: Path, content: Any) -> None:
        edit_json(folder / "tokenizer_config.json", chat_template=content)
        refused(lambda: load_tokenizer(folder), r"tokenizer_config\.json", "chat_template", kind=CorruptCheckpointError)

    def test_templates_without_a_default(self, folder: Path) -> None:
        edit_json(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": TEMPLATE}])
        refused(lambda: chat_ids(folder), "rag", "no default", "--no-chat", kind=PromptError)
        assert encode_prompt(load_tokenizer(folder), "hello", chat=False).shape == (1, 5)

    def test_templates_with_one(self, folder: Path) -> None:
        both = [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        edit_json(folder / "tokenizer_config.json", chat_template=both)
        assert chat_ids(folder).shape == (1, 5)

    def test_blocks_of_transformers_own_are_templates(self, folder: Path) -> None:
        content = (
            "{% generation %}{% for m in messages %}{% if m.x %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
        )
        (folder / "chat_template.jinja").write_text(content + "{% endgeneration %}", encoding="utf-8")
        assert chat_ids(folder).shape == (1, 5)

    @pytest.mark.parametrize("content", ['{"model": {"type": "Next"}}', '{"version": 5}', "{}", '{"added_tokens": 3}'])
    def test_a_tokenizer_of_another_kind(self, folder: Path, content: str) -> None:
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        refused(lambda: load_tokenizer(folder), r"tokenizer\.json", kind=CorruptCheckpointError)

    def test_no_question_is_asked_about_code_in_the_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "mine.py").write_text("raise SystemExit('code of the checkpoint was run')", encoding="utf-8")
        edit_json(
            folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.A", "mine.A"]}, tokenizer_class="A"
        )
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
        assert load_tokenizer(folder).encode("hello", add_special_tokens=False) == [71, 68, 75, 75, 78]

    def test_another_models_tokenizer(self, load: Any, folder: Path) -> None:
        import torch

        model = load(folder)
        refused(lambda: model(torch.tensor([[1, 264]])), "token 264", "0 to 263", "tokenizer", kind=PromptError)
        refused(lambda: model(torch.tensor([[1, -1]])), "token -1", kind=PromptError)
