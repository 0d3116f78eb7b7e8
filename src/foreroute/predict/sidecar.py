"""The sidecar: fitted predictors in one safetensors file beside the checkpoint, valid for that checkpoint alone.

Its bytes depend only on the model, the text and the settings: no time, no path, no order of a hash map.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save_file

from foreroute.errors import PredictorError, named
from foreroute.predict.fitted import RidgeLayer, TokenTable
from foreroute.whole_files import atomic_write, beside, check_no_pointer, parse_object

SIDECAR_NAME = "predictor.foreroute.safetensors"
FORMAT = 3
# All metadata under one key: safetensors writes several keys in the order of a hash map.
_KEY = "foreroute"
_ESTIMATOR = "estimator."
_TABLE = "token_table."


@dataclass(frozen=True)
class Sidecar:
    """Fitted predictors of one model.

    fingerprint: of the checkpoint (CheckpointIndex.fingerprint). about: corpus, settings, held-out scores.
    ridge: per MoE layer its map to the next. default_vectors: per MoE layer [experts, hidden], empty when no expert
    could be observed. token_table: predicts layer 0. popularity: per MoE layer [experts] int64.
    choice: per MoE layer the name of the predictor of the next one; None for no guess.
    estimator: its weights by name; empty when none was trained.
    """

    fingerprint: str
    ridge: list[RidgeLayer | None]
    default_vectors: list[torch.Tensor | None]
    token_table: TokenTable | None
    popularity: list[torch.Tensor]
    choice: list[str | None]
    about: dict[str, Any] = field(default_factory=dict)
    estimator: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything fitted, by name: e.g. each layer's default vectors [experts, hidden]."""
        named: dict[str, torch.Tensor] = {}
        for layer, entry in enumerate(self.ridge):
            if entry is not None:
                named[f"ridge.{layer}.from_hidden"] = entry.from_hidden
                named[f"ridge.{layer}.from_gates"] = entry.from_gates
                named[f"ridge.{layer}.bias"] = entry.bias
        for layer, vectors in enumerate(self.default_vectors):
            if vectors is not None:
                named[f"default_vectors.{layer}"] = vectors
        for layer, counts in enumerate(self.popularity):
            named[f"popularity.{layer}"] = counts
        if self.token_table is not None:
            named.update({_TABLE + name: tensor for name, tensor in vars(self.token_table).items()})
        named.update({_ESTIMATOR + name: weight for name, weight in self.estimator.items()})
        return {name: tensor.contiguous() for name, tensor in sorted(named.items())}

    def save(self, path: Path) -> None:
        """Write the file under a temporary name and rename it when it is complete.

        Raises:
            PredictorError: it cannot be written.
        """
        tensors = self.tensors()
        about = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "choice": self.choice,
            "digest": _digest(tensors),
            "about": self.about,
        }
        write_whole(path, tensors, about)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Sidecar":
        """Read and check the file at `path`, written by `save` in this version or an earlier one of the same format.

        What earlier versions fitted besides, a guess from before each layer's own attention, is left out.

        Args:
            fingerprint: of the checkpoint in use.
        Raises:
            PredictorError: not such a file, truncated, damaged, or fitted to another model.
        """
        tensors, about = read_whole(path)
        if about.get("format") != FORMAT:
            raise PredictorError(f"{path} has format {about.get('format')!r:.40}, not {FORMAT}. {_fit_again()}")
        if about.get("fingerprint") != fingerprint:
            raise PredictorError(f"{path} was fitted to another model or to other weights. {_fit_again()}")
        if about.get("digest") != _digest(tensors):
            raise PredictorError(f"{path} is damaged: its numbers are not those that were written. {_fit_again()}")
        wrong = _why_no_account(about, tensors)
        if wrong:
            raise PredictorError(f"{path} is damaged: {wrong}. {_fit_again()}")
        choice = about["choice"]
        layers = range(len(choice))
        return cls(
            fingerprint,
            [_ridge_layer(tensors, layer) for layer in layers],
            [tensors.get(f"default_vectors.{layer}") for layer in layers],
            _token_table(tensors),
            [tensors[f"popularity.{layer}"] for layer in layers],
            choice,
            about["about"],
            {name[len(_ESTIMATOR) :]: weight for name, weight in tensors.items() if name.startswith(_ESTIMATOR)},
        )


def find_sidecar(folder: Path, asked: str) -> Path | None:
    """Find the sidecar: `asked` is "auto" (the one of the model in `folder`, if any), "no" (none), or a file or folder.

    Of a GGUF file, `folder` is that file, and its sidecar next to it.

    Raises:
        PredictorError: `asked` names a file that does not exist.
    """
    if asked == "no":
        return None
    if asked == "auto":
        path = beside(folder, SIDECAR_NAME)
        return path if path.exists() else None
    path = Path(asked).expanduser()
    if path.is_dir():
        path = path / SIDECAR_NAME
    if not path.is_file():
        raise PredictorError(f"{path} does not exist. Write it with `foreroute fit`, or leave --predictor out.")
    return path


def write_whole(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write `tensors` of any shape [...] and the metadata `about` to `path`; a failed write leaves no file there.

    Raises:
        PredictorError: it cannot be written.
    """
    try:
        with atomic_write(path) as temporary:
            save_file(dict(tensors), temporary, metadata={_KEY: json.dumps(about, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise PredictorError(f"{path} cannot be written: {error}. Choose another --out.") from error


def read_whole(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file written by `write_whole`: its tensors, of any shape [...], and its metadata.

    Raises:
        PredictorError: not such a file, a git-LFS pointer, or truncated.
    """
    check_no_pointer(path, PredictorError)
    wrong = f"{path} is truncated or no file of `foreroute fit`"
    with named(wrong, PredictorError, _fit_again()):
        # Not mapped: a mapped file that is truncated kills the process; overwriting one changes tensors read from it.
        raw = path.read_bytes()
        header_nbytes = int.from_bytes(raw[:8], "little")
        metadata = parse_object(raw[8 : 8 + header_nbytes], wrong, PredictorError, _fit_again()).get("__metadata__")
        tensors = deserialize(raw)
    said = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(said, str):
        raise PredictorError(f"{wrong}: it does not say how it was made. {_fit_again()}")
    return tensors, parse_object(said.encode(), wrong, PredictorError, _fit_again())


def _why_no_account(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """What a sidecar's metadata lacks; "" where it is complete."""
    choice, made = about.get("choice"), about.get("about")
    if not isinstance(choice, list) or not all(isinstance(name, str | None) for name in choice):
        return f"its choice of predictors is {choice!r:.40}"
    if not isinstance(made, dict):
        return f"how it was made is {made!r:.40}"
    held_out = made.get("held_out", {})
    if not isinstance(held_out, dict) or not all(_are_scores(scores, len(choice)) for scores in held_out.values()):
        return "its held-out scores are not a number or null for each layer"
    absent = next((layer for layer in range(len(choice)) if f"popularity.{layer}" not in tensors), None)
    if absent is not None:
        return f"popularity.{absent} is missing"
    table = {name[len(_TABLE) :] for name in tensors if name.startswith(_TABLE)}
    if table and table != {entry.name for entry in fields(TokenTable)}:
        return "its token table is not whole"
    return ""


def _are_scores(scores: Any, num_layers: int) -> bool:
    if not isinstance(scores, dict):
        return False
    figures = [scores[name] for name in ("recall_k", "missed_mass") if name in scores]
    return all(
        isinstance(figure, list)
        and len(figure) == num_layers
        and all(isinstance(value, int | float | None) for value in figure)
        for figure in figures
    )


def _fit_again() -> str:
    return "Fit it again (`foreroute fit`), remove it, or ignore it with --predictor no."


def _ridge_layer(tensors: Mapping[str, torch.Tensor], layer: int) -> RidgeLayer | None:
    parts = [tensors.get(f"ridge.{layer}.{part}") for part in ("from_hidden", "from_gates", "bias")]
    hidden, gates, bias = parts
    if hidden is None or gates is None or bias is None:
        return None
    return RidgeLayer(hidden, gates, bias)


def _token_table(tensors: Mapping[str, torch.Tensor]) -> TokenTable | None:
    parts = {name[len(_TABLE) :]: tensor for name, tensor in tensors.items() if name.startswith(_TABLE)}
    return TokenTable(**parts) if parts else None


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
