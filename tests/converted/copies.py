"""Copies of the converter's files in its other quantisation, whole or in parts."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from tests.converted.convert import CONVERTED, tensors_hash
from tests.support.checkpoints import save_tokenizer


def recorded(name: str) -> Any:
    """What tests/converted/convert.py recorded of the model `name`."""
    return np.load(CONVERTED / f"{name}.npz")


def write_q8_0(name: str, plain: Path, out: Path, *, own_tokenizer: bool = False, per_part: int = 0) -> None:
    """The converter's file in Q8_0, from the one in F32: the same tensors, as their hash says.

    own_tokenizer: with the tokenizer in the file's metadata, in place of one beside it. per_part: tensors of a part, as
    the package's writer splits them; 0 for one file.
    """
    reader, quantised = gguf.GGUFReader(plain), dict(recorded(name)["quantised"].tolist())
    out.parent.mkdir(parents=True, exist_ok=True)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture, split_max_tensors=per_part)
    without = ("GGUF.",) if own_tokenizer else ("GGUF.", "tokenizer.")
    for key, field in reader.fields.items():
        if key != "general.architecture" and not key.startswith(without):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType[quantised.get(tensor.name, "F32")]
        writer.add_tensor(tensor.name, quantize(np.array(tensor.data), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not own_tokenizer:
        save_tokenizer(out.parent)
    if not per_part:
        assert tensors_hash(out) == str(recorded(name)["sha256"])
