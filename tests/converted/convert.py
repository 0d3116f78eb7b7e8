"""Make tests/converted/files: tiny models as llama.cpp's own converter writes them, and what llama.cpp says of them.

    python -m tests.converted.convert LLAMA_CPP PYTHON [NAME ...]

LLAMA_CPP is a folder with llama.cpp's convert_hf_to_gguf.py, `conversion` and `gguf-py`: in the source distribution of
llama-cpp-python, vendor/llama.cpp (the files here: 0.3.36). PYTHON is an interpreter that has llama-cpp-python. Nothing
of either is part of this repository. Two things are told to the converter, as the vocabulary is made up: that the
tokenizer is a BPE one, and its pre-tokenizer's name.

Of a model NAME there are then NAME.gguf.xz, in F32, and in NAME.npz: the likeliest token after each of 2,000, by
llama.cpp from that file (`f32`, prompts of 80 tokens at once) and from the converter's Q8_0 file (`q8_0`, token by
token); names and types of the tensors that are quantised there (`quantised`), and the hash of all tensors (`sha256`).
"""

import importlib
import json
import lzma
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file, save_file

from tests.converted.models import TINY, tiny_model
from tests.support.checkpoints import save_tokenizer

# Where a model's published class has another name than transformers' own.
_PUBLISHED = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
# Settings that published models have beside transformers' own, or in place of them.
_PUBLISHED_SETTINGS: dict[str, dict[str, Any]] = {
    "mimo2": {
        "swa_head_dim": 32, "swa_num_attention_heads": 4, "swa_v_head_dim": 16, "swa_num_key_value_heads": 2,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "hybrid_layer_pattern": [0, 1, 1],
        "layernorm_epsilon": 3e-6, "sliding_window": 7, "swa_rope_theta": 5000.0,
        "rope_parameters": {"rope_theta": 70000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
    },
}  # fmt: skip
# llama.cpp loads no BPE vocabulary without some.
MERGES = (("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("i", "n"))
# Models of which llama.cpp computes something else than transformers, from the same file.
DIFFERS = {
    "deepseek2": "it refuses a model without a low rank of queries, unless it has 26, 27 or 48 layers",
    "deepseek2-groups": "groups of experts are chosen by the sum of their two best, as in V3, not by the best",
    "glm-dsa": "it ends the process with heads of the indexer as small",
    "glm4moelite": "that its scores are sigmoids is known by 47 layers and 154,880 tokens",
    "gpt-oss": "YaRN's bounds are rounded, whatever `truncate` says",
    "mimo2": "a window holds one token less",
    "phimoe": "norms have no mean, and the experts are not those of the sparse mixer",
}
CONVERTED = Path(__file__).parent / "files"


def convert(name: str, llama_cpp: Path, out: Path, outtype: str = "ALL_F32", **options: Any) -> None:
    """Write the tiny model `name` to `out` as the converter does. options: the converter's."""
    if str(llama_cpp) not in sys.path:
        sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
        # Its own, newer than the package here.
        for module in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
            del sys.modules[module]
    import gguf

    conversion, base = (importlib.import_module(one) for one in ("conversion", "conversion.base"))

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        model = tiny_model(name)
        model.save_pretrained(source)
        _write_as_published(source, name, type(model).__name__)
        save_tokenizer(source, MERGES)
        architecture = conversion.get_model_architecture(
            base.ModelBase.load_hparams(source, False), conversion.ModelType.TEXT
        )
        converter = conversion.get_model_class(architecture)
        own = type(converter.__name__, (converter,), {
            "model_arch": converter.model_arch,
            "set_vocab": base.TextModel.set_vocab,
            "get_vocab_base_pre": lambda self, tokenizer: "qwen2",
            "no_mtp": True,
        })  # fmt: skip
        own(source, gguf.LlamaFileType[outtype], out, eager=True, model_name=name, **options).write()


def _write_as_published(folder: Path, name: str, class_name: str) -> None:
    """Spell settings as published models do, where transformers spells them anew when it saves a model.

    Qwen3-VL's published experts are transposed, too: the converter takes all files for such.
    """
    path = folder / "config.json"
    if TINY[name][0] == "qwen3_vl_moe":
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {at: one.transpose(1, 2).contiguous() if ".experts." in at else one for at, one in tensors.items()},
            folder / "model.safetensors",
        )
    saved = json.loads(path.read_text())
    own = {} if "text_config" in saved else TINY[name][1]
    own = {**own, **_PUBLISHED_SETTINGS.get(name, {})}
    settings = {**saved, **own, "architectures": [_PUBLISHED.get(class_name, class_name)]}
    path.write_text(json.dumps(settings))


def prompts() -> np.ndarray:
    """25 prompts of 80 tokens."""
    return np.random.RandomState(5).randint(0, 256, (25, 80))


def tensors_hash(path: Path) -> str:
    """The hash of all tensors of the file, by name."""
    found = sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda one: one.name):
        found.update(tensor.name.encode() + tensor.data.tobytes())
    return found.hexdigest()


# Runs in the other interpreter: the likeliest token after each, of prompts [number, length] given `step` at a time.
_LLAMA = """
import sys, numpy as np, llama_cpp
path, prompts, out, step = sys.argv[1], np.load(sys.argv[2]), sys.argv[3], int(sys.argv[4])
kind = llama_cpp.GGML_TYPE_F32
model = llama_cpp.Llama(path, n_ctx=96, n_batch=step, n_ubatch=step, n_threads=1, n_threads_batch=1, type_k=kind,
    type_v=kind, verbose=False, logits_all=True, flash_attn=False, yarn_beta_fast=16.0, yarn_beta_slow=2.0)
found = []
for prompt in prompts.tolist():
    model.reset()
    for at in range(0, len(prompt), step):
        model.eval(prompt[at:at + step])
    found.append(np.array(model.scores[:len(prompt)]).argmax(1))
np.save(out, np.array(found, dtype=np.uint16))
"""


def likeliest(python: str, path: Path, step: int) -> np.ndarray:
    """llama.cpp's likeliest token after each token of `prompts`, which it is given `step` at a time."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "given.npy", Path(folder) / "out.npy"
        np.save(given, prompts())
        subprocess.run(
            [python, "-c", _LLAMA, str(path), str(given), str(out), str(step)], check=True, capture_output=True
        )
        return np.asarray(np.load(out))


def make(name: str, llama_cpp: Path, python: str) -> None:
    """Write the files of the tiny model `name`."""
    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = Path(folder) / "f32.gguf", Path(folder) / "q8_0.gguf"
        convert(name, llama_cpp, plain)
        convert(name, llama_cpp, quantised, "MOSTLY_Q8_0")
        content = plain.read_bytes()
        (CONVERTED / f"{name}.gguf.xz").write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
        kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(quantised).tensors}
        said = {
            "quantised": np.array([(tensor, kind) for tensor, kind in kinds.items() if kind != "F32"]),
            "sha256": np.array(tensors_hash(quantised)),
        }
        if name not in DIFFERS:
            said.update(f32=likeliest(python, plain, 80), q8_0=likeliest(python, quantised, 1))
        np.savez_compressed(CONVERTED / f"{name}.npz", **said)


if __name__ == "__main__":
    CONVERTED.mkdir(exist_ok=True)
    for one in sys.argv[3:] or TINY:
        make(one, Path(sys.argv[1]).resolve(), sys.argv[2])
