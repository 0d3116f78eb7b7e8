"""An answer ends where any of a checkpoint's files says that it does, in every command and from Python."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Request, Sampling
from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.errors import CheckpointError
from foreroute.generation.generate import generate
from foreroute.model.generation_settings import SpecialTokens, complete_generation_config, end_tokens
from foreroute.model.text import encode_prompt, load_tokenizer
from tests.batching.test_engine import Heard
from tests.support.checkpoints import edit_json
from tests.support.families import VOCAB_SIZE
from tests.support.runs import ONE_PROMPT

IDS = ONE_PROMPT.ids
NEW_TOKENS = 12
CONFIG = foreroute.EngineConfig(packed="no")


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints.get("qwen3_moe")


@pytest.fixture(scope="module")
def free_run(folder, references) -> list[int]:
    """What the model says where nothing ends it."""
    model = references.model(folder)
    return model.generate(IDS, attention_mask=ONE_PROMPT.mask, max_new_tokens=NEW_TOKENS, do_sample=False)[
        0, IDS.shape[1] :
    ].tolist()


@pytest.fixture(scope="module")
def end(free_run) -> int:
    """One of those tokens: an ordinary one of the vocabulary, and not the first."""
    return next(token for token in free_run[3:] if token < 256 and token not in free_run[:3])


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "checkpoint"))


def symbol_of(folder: Path, token: int) -> str:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return next(symbol for symbol, number in vocabulary.items() if number == token)


def add_token(folder: Path, token: int) -> str:
    """Make an entry of the vocabulary an added, special one; its text."""
    path, symbol = folder / "tokenizer.json", symbol_of(folder, token)
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": token, "content": symbol, "special": True, **flags})
    path.write_text(json.dumps(content, ensure_ascii=False))
    return symbol


def by_generation_config(folder: Path, token: int) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=token)


def by_config(folder: Path, token: int) -> None:
    edit_json(folder / "config.json", eos_token_id=token)
    edit_json(folder / "generation_config.json", eos_token_id=260)


def by_tokenizer(folder: Path, token: int) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=symbol_of(folder, token))


def by_an_older_tokenizer(folder: Path, token: int) -> None:
    symbol = symbol_of(folder, token)
    edit_json(
        folder / "tokenizer_config.json",
        eos_token={"__type": "AddedToken", "content": symbol, "special": True},
        added_tokens_decoder={str(token): {"content": symbol, "special": True}},
    )


def by_template(folder: Path, token: int) -> None:
    symbol = add_token(folder, token)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}" + symbol + "\n{% endfor %}"
    edit_json(folder / "tokenizer_config.json", chat_template=template)


def by_template_file(folder: Path, token: int) -> None:
    symbol = add_token(folder, token)
    template = "{% for m in messages %}{{ m.content }} {{ '" + symbol + "' if not loop.last }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


SOURCES = [by_generation_config, by_config, by_tokenizer, by_an_older_tokenizer, by_template, by_template_file]


@pytest.mark.parametrize("name_end", SOURCES)
def test_an_answer_ends_where_one_file_says_so(name_end, copied, load, free_run, end):
    name_end(copied, end)
    model, tokenizer = load(copied, "30%", packed="no"), load_tokenizer(copied)
    expected = free_run[: free_run.index(end) + 1]
    said = model.generation_config.eos_token_id
    assert end in (said if isinstance(said, list) else [said])
    assert all(token < VOCAB_SIZE for token in ([said] if isinstance(said, int) else said))
    options = {"attention_mask": ONE_PROMPT.mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    assert model.generate(IDS, **options)[0, IDS.shape[1] :].tolist() == expected
    for loop in ({}, {"cache_implementation": "dynamic"}):
        report = generate(model, tokenizer, IDS, max_new_tokens=NEW_TOKENS, do_sample=False, **loop)
        assert (list(report.token_ids), report.finish_reason) == (expected, "stop")
    heard, engine = Heard(), BatchEngine(model, tokenizer, 64)
    engine.submit(Request(IDS[0].tolist(), NEW_TOKENS, Sampling(temperature=0.0)), heard)
    heard.wait()
    engine.close()
    assert (heard.tokens, heard.end.reason) == (expected, "stop")
    # Who says so goes past it, and rows that end are filled up without a word.
    options = {**options, "eos_token_id": None}
    assert model.generate(IDS, **options)[0, IDS.shape[1] :].tolist() == free_run
    assert model.generation_config.pad_token_id is not None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": [{"id"'),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
        lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"),
    ],
)
def test_an_unreadable_tokenizer_does_not_stop_a_load(spoil, copied, load, free_run):
    spoil(copied)
    model = load(copied, "30%", packed="no")
    options = {"attention_mask": ONE_PROMPT.mask, "max_new_tokens": 3, "do_sample": False}
    assert model.generate(IDS, **options)[0, IDS.shape[1] :].tolist() == free_run[:3]


TOKENS = ["<|start|>", "<|end|>", "<|return|>", "<|im_end|>", "<s>", "</s>", "<|user|>", "<end_of_turn>", "<|eot_id|>",
          "<|end_of_text|>"]  # fmt: skip
TEMPLATES = {
    "<|im_end|>": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "<|eot_id|>": "{% for m in messages %}{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}",
    "<end_of_turn>": "{% for m in messages %}{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "<end_of_turn>\n{% endfor %}",
    # Its mark of the next turn is what ends one.
    "<|user|>": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}",
    # gpt-oss: between the parts of an answer stands <|end|>, which ends no answer.
    "<|return|>": "{% for m in messages %}<|start|>{{ m.role }}{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
    "<|end|>": "{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    # What begins a text is no end.
    None: "{% for m in messages %}{{ bos_token if m.role == 'user' }}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize(("token", "template"), TEMPLATES.items(), ids=str)
def test_what_a_template_ends_the_assistants_turn_with(token, template):
    named = {"bos_token": "<s>", "eos_token": "<|end_of_text|>"}
    ends = SpecialTokens({one: at for at, one in enumerate(TOKENS)}, named, template).ends()
    assert [TOKENS[at] for at in ends] == ["<|end_of_text|>", *([token] if token else [])]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"eos": 5}, 5),
        ({"eos": 5, "eot": 7, "eom": 9}, [5, 7, 9]),
        ({"eot": 7, "eos": 7}, 7),
        ({"eos": 4000}, None),
        ({}, None),
    ],
)
def test_a_gguf_file_names_up_to_three(named, expected, tmp_path):
    path = tmp_path / "model.gguf"
    path.touch()
    settings = {f"tokenizer.ggml.{name}_token_id": token for name, token in named.items()}
    config = SimpleNamespace(eos_token_id=None, vocab_size=100, is_encoder_decoder=False)
    config.get_text_config = lambda: config
    model = SimpleNamespace(
        config=config, generation_config=SimpleNamespace(eos_token_id=None, pad_token_id=None, use_cache=None)
    )
    complete_generation_config(model, path, GgufIndex(path, {}, settings, {}, {}))
    assert model.generation_config.eos_token_id == expected


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture
def stop_text(folder, free_run) -> tuple[str, str]:
    """What the model says up to some text, and that text: of two tokens, so that it is looked for in what is said."""
    said = "".join(chr(ord(one)) for one in text_of(load_tokenizer(folder), free_run))
    at = next(at for at in range(2, len(said) - 2) if "\ufffd" not in said[at : at + 2])
    stop = said[at : at + 2]
    return said[: said.index(stop)], stop


@pytest.mark.parametrize("in_a_list", [False, True])
def test_texts_that_end_an_answer_do_so_everywhere(in_a_list, copied, load, stop_text):
    before, stop = stop_text
    edit_json(copied / "generation_config.json", stop_strings=[stop, "never said"] if in_a_list else stop)
    model, tokenizer = load(copied, "30%", packed="no"), load_tokenizer(copied)
    for options in ({}, {"cache_implementation": "dynamic"}):
        pieces: list[str] = []
        report = generate(
            model, tokenizer, IDS, on_text=pieces.append, max_new_tokens=NEW_TOKENS, do_sample=False, **options
        )
        assert (report.text, report.finish_reason) == (before, "stop")
        assert "".join(pieces) == before
        assert len(report.token_ids) < NEW_TOKENS
    # The caller's own take their place, or none.
    longer = generate(model, tokenizer, IDS, max_new_tokens=NEW_TOKENS, do_sample=False, stop_strings=["never said"])
    assert (longer.finish_reason, stop in longer.text) == ("length", True)
    engine = BatchEngine(model, tokenizer, 64)
    for ignored, reason in ((False, "stop"), (True, "length")):
        heard = Heard()
        engine.submit(Request(IDS[0].tolist(), NEW_TOKENS, Sampling(temperature=0.0), ignore_eos=ignored), heard)
        assert heard.wait().end.reason == reason
        assert ("".join(step.text for step in heard.steps) + heard.end.text == before) == (not ignored)
    engine.close()
    # From Python as of transformers: it wants the tokenizer.
    made = model.generate(IDS, attention_mask=ONE_PROMPT.mask, max_new_tokens=NEW_TOKENS, do_sample=False,
                          tokenizer=tokenizer)  # fmt: skip
    assert text_of(tokenizer, made[0, IDS.shape[1] :].tolist()).endswith(stop)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_cache_that_is_off_is_put_on(file, copied, load, free_run):
    edit_json(copied / file, use_cache=False)
    if file == "config.json":
        (copied / "generation_config.json").unlink()
    model = load(copied, "30%", packed="no")
    options = {
        "attention_mask": ONE_PROMPT.mask,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
    }

    def steps(work: Callable[[], list[int]]) -> tuple[int, int]:
        before = model.foreroute.stats()
        assert work() == free_run
        done = model.foreroute.stats().minus(before)
        return done.prefill.steps, done.decode.steps

    def by_transformers(**more: Any) -> list[int]:
        return model.generate(IDS, **options, **more)[0, IDS.shape[1] :].tolist()

    assert steps(by_transformers) == (1, NEW_TOKENS - 1)
    report = generate(model, load_tokenizer(copied), IDS, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    assert (report.loop, list(report.token_ids)) == ("lean", free_run)
    # Who asks for it has it off.
    assert steps(lambda: by_transformers(use_cache=False)) == (NEW_TOKENS, 0)
    with_chunks = generate(
        model, load_tokenizer(copied), IDS, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
        use_cache=False, prefill_chunk=8,
    )  # fmt: skip
    assert list(with_chunks.token_ids) == free_run


def test_a_text_that_begins_with_the_start_token_has_one(copied):
    tokenizer = load_tokenizer(copied)
    start = tokenizer.bos_token_id
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", start)]
    )
    plain = encode_prompt(tokenizer, "ab", chat=False)[0].tolist()
    assert plain[0] == start
    assert encode_prompt(tokenizer, "<bos>ab", chat=False)[0].tolist() == plain
    # Two that are written down are meant.
    assert encode_prompt(tokenizer, "<bos><bos>ab", chat=False)[0].tolist() == [start, *plain]
    assert torch.equal(encode_prompt(tokenizer, "ab", chat=False), torch.tensor([plain]))


@pytest.mark.parametrize("spoilt", [5, "x", [1], [{"id": "2", "content": "</s>"}], [{"id": 1e308, "content": "</s>"}]])
def test_tokens_of_another_form_are_passed_over(tmp_path, spoilt):
    """`load_tokenizer` says what is wrong with them; the ends that can be read are found all the same."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": spoilt, "model": spoilt}), encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<end>": 7, "<odd>": "8"}), encoding="utf-8")
    settings = {"eos_token": "<end>", "added_tokens_decoder": spoilt, "chat_template": [3, {"name": "default"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert SpecialTokens.read(tmp_path).ends() == [7]


@pytest.mark.parametrize("said", [1.5, "2", [1, "2"], {"a": 1}, True])
def test_an_end_that_is_no_id_is_named(said):
    with pytest.raises(CheckpointError, match="eos_token_id"):
        end_tokens(SimpleNamespace(eos_token_id=said))


@pytest.mark.parametrize(("said", "ends"), [(None, [7, 8]), (9, [9, 7, 8]), ([9, 7], [9, 7])])
def test_a_list_of_ends_is_not_added_to_by_the_template(tmp_path, said, ends):
    """Some models write a turn's end between the parts of one answer, and list the ends that are meant."""
    settings = {
        "eos_token": "<end>",
        "chat_template": "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}<turn>{% endfor %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<end>": 7, "<turn>": 8}), encoding="utf-8")
    config = SimpleNamespace(eos_token_id=None, vocab_size=10, is_encoder_decoder=False)
    config.get_text_config = lambda: config
    generation = SimpleNamespace(eos_token_id=said, pad_token_id=None, use_cache=True)
    complete_generation_config(SimpleNamespace(config=config, generation_config=generation), tmp_path, None)
    assert generation.eos_token_id == ends


def test_a_stack_outlives_the_model_around_it(folder):
    """Its experts are closed with the last of the modules that are entered, not with the outermost."""
    import gc

    stack = foreroute.load(folder, "30%", config=CONFIG).model
    gc.collect()
    assert stack(IDS).last_hidden_state.isfinite().all()
    stack.foreroute.close()
