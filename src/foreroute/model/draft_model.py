"""Load a small model whose tokens the large one verifies: by transformers, whole, and kept in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from foreroute.checkpoint.gguf_file import is_gguf
from foreroute.checkpoint.index import CheckpointIndex
from foreroute.checkpoint.locate import locate, read_index
from foreroute.errors import CheckpointError, UnsupportedModelError, named
from foreroute.model.config_file import read_config
from foreroute.model.text import load_tokenizer
from foreroute.units import format_memory

# In place of a model's path: drafts are looked up in the text itself.
PROMPT_LOOKUP = "prompt-lookup"
# Of weights that the processor's caches hold, f32 is computed quickest; larger ones are read from memory, as stored.
_MOST_IN_F32 = 2**25
# Tokens shown of those that differ.
_MOST_SHOWN = 3


@dataclass(frozen=True, eq=False)
class DraftModel:
    """folder: of its checkpoint. nbytes: of its weights in memory. context: most positions; None: not known."""

    model: PreTrainedModel
    folder: Path
    nbytes: int
    context: int | None


@dataclass(frozen=True)
class DraftFiles:
    """A draft's checkpoint whose headers have been checked; `load` reads its weights."""

    folder: Path
    config: Any
    num_parameters: int

    @property
    def dtype(self) -> torch.dtype:
        """In which it will be computed."""
        stored: torch.dtype = self.config.dtype or torch.float32
        return torch.float32 if self.num_parameters <= _MOST_IN_F32 else stored

    @property
    def nbytes(self) -> int:
        """Bytes that its weights will take in memory."""
        return self.num_parameters * self.dtype.itemsize

    def load(self) -> DraftModel:
        """Read the weights.

        Raises:
            CheckpointError: transformers cannot build the model.
        """
        what = f"The draft {self.folder} cannot be loaded"
        with named(what, CheckpointError, "It has to be a causal language model."):
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, config=self.config, dtype=self.dtype, use_safetensors=True, trust_remote_code=False
            )
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        nbytes = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
        return DraftModel(model.eval(), self.folder, nbytes, context)


def find_draft(path_or_hub_id: str | Path, folder: Path, index: CheckpointIndex) -> DraftFiles:
    """Find the checkpoint of a draft for the model in `folder`, whose headers are `index`, and check its headers.

    Raises:
        CheckpointError: it cannot draft for this model: another tokenizer, more weights, or no causal language model;
        or
            there is none.
    """
    found = locate(path_or_hub_id)
    if is_gguf(found):
        raise UnsupportedModelError(
            f"The draft {found} is a GGUF file; drafts are read from safetensors. Give the folder of such a "
            f"checkpoint, or take --draft {PROMPT_LOOKUP}."
        )
    files = read_index(found)
    config = read_config(found)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"The draft {found} is an encoder-decoder, which continues no text. Take a decoder."
        )
    if files.nbytes > index.nbytes:
        raise CheckpointError(
            f"The draft {found} has {format_memory(files.nbytes)} of weights, the model "
            f"{format_memory(index.nbytes)}: its tokens would take longer than the model's own. Take a smaller draft."
        )
    _check_vocabulary(found, folder)
    return DraftFiles(found, config, sum(_numel(entry.shape) for entry in files.tensors.values()))


def _numel(shape: Any) -> int:
    count = 1
    for extent in shape:
        count *= int(extent)
    return count


def _check_vocabulary(draft: Path, folder: Path) -> None:
    """Raises CheckpointError: the tokenizers of both do not give the same numbers to the same tokens."""
    theirs: Mapping[str, int]
    theirs, ours = (load_tokenizer(one).get_vocab() for one in (draft, folder))
    if theirs == ours:
        return
    differing = [token for token, number in ours.items() if theirs.get(token) != number]
    differing += [token for token in theirs if token not in ours]
    shown = ", ".join(repr(token) for token in differing[:_MOST_SHOWN])
    raise CheckpointError(
        f"The draft {draft} has another tokenizer than {folder}: {len(theirs)} tokens and {len(ours)}, of which "
        f"{len(differing)} differ ({shown}). Its tokens would mean something else: take a draft with the model's "
        "tokenizer."
    )
