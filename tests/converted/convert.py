"""Make tests/converted/files/*.gguf.xz: tiny models as llama.cpp's own converter writes them.

    python -m tests.converted.convert LLAMA_CPP [NAME ...]

LLAMA_CPP is a folder with llama.cpp's convert_hf_to_gguf.py, `conversion` and `gguf-py`: in the source distribution of
llama-cpp-python, vendor/llama.cpp (the files here: 0.3.36). Nothing of it is part of this repository. Two things are
told to it, as the vocabulary is made up: that the tokenizer is a BPE one, and its pre-tokenizer's name.
"""

import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.converted.models import TINY, tiny_model
from tests.support.checkpoints import save_tokenizer

# Where a model's published class has another name than transformers' own.
_PUBLISHED = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
CONVERTED = Path(__file__).parent / "files"


def convert(name: str, llama_cpp: Path, out: Path, outtype: str = "ALL_F32", **options: Any) -> None:
    """Write the tiny model `name` to `out` as the converter does. options: the converter's."""
    for folder in (llama_cpp, llama_cpp / "gguf-py"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import gguf
    from conversion import ModelType, get_model_architecture, get_model_class  # type: ignore[import-not-found]
    from conversion.base import ModelBase, TextModel  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        model = tiny_model(name)
        model.save_pretrained(source)
        _write_as_published(source, name, type(model).__name__)
        save_tokenizer(source)
        architecture = get_model_architecture(ModelBase.load_hparams(source, False), ModelType.TEXT)
        converter = get_model_class(architecture)
        own = type(converter.__name__, (converter,), {
            "model_arch": converter.model_arch,
            "set_vocab": TextModel.set_vocab,
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
    settings = {**saved, **own, "architectures": [_PUBLISHED.get(class_name, class_name)]}
    path.write_text(json.dumps(settings))


if __name__ == "__main__":
    CONVERTED.mkdir(exist_ok=True)
    for one in sys.argv[2:] or TINY:
        with tempfile.TemporaryDirectory() as made:
            convert(one, Path(sys.argv[1]).resolve(), Path(made) / "model.gguf")
            content = (Path(made) / "model.gguf").read_bytes()
        packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
        (CONVERTED / f"{one}.gguf.xz").write_bytes(packed)
        print(f"{one}: {len(content)} bytes, {len(packed)} compressed")
