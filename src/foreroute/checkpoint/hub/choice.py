"""Choose which files of a repository to read, by their names: a GGUF model, and the settings beside the weights.

A tag behind a hub id (`org/name:Q4_K_M`) means the model whose file or folder name has it, in any case, as for
llama.cpp's `-hf`. Unlike there (Q4_K_M, or the first file), nothing is chosen where several models fit, or without a
tag among several: a quantisation decides the numbers and tens of gigabytes, so the error lists the models instead.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from foreroute.checkpoint.gguf_names import SUFFIX, is_gguf_name, is_model_name, part_of, passed_over
from foreroute.checkpoint.index import INDEX, SINGLE
from foreroute.errors import CheckpointError, UnsupportedModelError

# Files beside the weights, except those that match _NOT_SETTINGS (an index of pickles, for example).
_SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_SETTINGS = ("*.bin.index.json", "*.msgpack.index.json", "*.h5.index.json", "consolidated*")
_PICKLES = (".bin", ".pt", ".pth")
# Q4_K_M, IQ4_XS, UD-Q4_K_XL, TQ1_0, MXFP4_MOE, BF16: a letter or two, bits, and variants of them.
_QUANTISATION = re.compile(r"(?<![a-z0-9])(?:ud-)?(?:i?q|tq|mxfp|nvfp|bf|fp|f)\d\w*", re.IGNORECASE)


@dataclass(frozen=True)
class GgufModel:
    """A model among a repository's GGUF files.

    name: its file's path, without the ending and a part's number. files: of its parts in order, as their names count
    them, whether they are there or not.
    """

    name: str
    files: tuple[str, ...]

    @property
    def quantisation(self) -> str:
        """Its quantisation, as its file's name or else its folder's has it; "" where neither has one."""
        path = PurePosixPath(self.name)
        found = _QUANTISATION.findall(path.name) or _QUANTISATION.findall(path.parent.name)
        return str(found[-1]) if found else ""


def gguf_models(names: Iterable[str]) -> list[GgufModel]:
    """The models among files; projectors, importance matrices and draft heads are none."""
    return _joined(name for name in names if is_model_name(name))


def _joined(names: Iterable[str]) -> list[GgufModel]:
    """GGUF files as models: the parts of one together."""
    found: dict[tuple[str, int], GgufModel] = {}
    for name in sorted(names):
        part = part_of(name)
        if part is None:
            found[name, 1] = GgufModel(name[: -len(SUFFIX)], (name,))
        else:
            found[part.stem, part.count] = GgufModel(part.stem, part.siblings)
    return list(found.values())


def choose_gguf(names: Collection[str], hub_id: str, tag: str | None, label: str) -> GgufModel:
    """Choose the GGUF model of a repository whose name carries `tag`; without a tag its only one.

    In order: the GGUF file that is named `tag`, whatever its name says that it is; the model whose quantisation is
    `tag`, or ends in it behind a separator: UD-Q4_K_XL for Q4_K_XL, and not Q4_K_M for Q4_K. A tag that is no
    quantisation, or a model whose names have none: the model that has `tag` in its path, between separators.

    Raises:
        UnsupportedModelError: there is no GGUF model.
        CheckpointError: several fit, or none does; names those that there are.
    """
    models = gguf_models(names)
    found = models if tag is None else _named(names, tag) or _that_fit(models, tag)
    if len(found) == 1:
        return found[0]
    if not found:
        raise _none_fits(names, models, hub_id, tag, label)
    if tag is None:
        raise CheckpointError(
            f"{label} has {len(found)} GGUF models: {_tags(models)}. Name one: {hub_id}:{_tag(found[0], models)}."
        )
    raise CheckpointError(
        f"{label} is any of {', '.join(model.files[0] for model in found)}. Name one of these files: "
        f"{hub_id}:{found[0].files[0]}."
    )


def _none_fits(
    names: Collection[str], models: Sequence[GgufModel], hub_id: str, tag: str | None, label: str
) -> CheckpointError:
    """Say what there is in place of a GGUF model that `tag` means."""
    if tag is None or not (models or any(name.endswith(".safetensors") for name in names)):
        return no_weights(hub_id, label, sorted(names))
    has_tag = _between(tag)
    hint = passed_over((name for name in names if has_tag.search(name.casefold())), f"{hub_id}:")
    if models:
        return CheckpointError(f"{label}: of its GGUF files none is {tag}. It has {_tags(models)}.{hint}")
    return UnsupportedModelError(
        f"{label}: {tag} is no quantisation there, as the repository has no GGUF model.{hint} Leave :{tag} out for its "
        "safetensors."
    )


def _named(names: Iterable[str], tag: str) -> list[GgufModel]:
    """The GGUF files whose path is `tag`, or else their name in a folder; of a part the whole model."""
    wanted = tag.casefold()
    models = _joined(name for name in names if is_gguf_name(name))
    rules: tuple[Callable[[str], bool], ...] = (
        lambda file: file == tag,
        lambda file: file.casefold() == wanted,
        lambda file: _base(file).casefold() == wanted,
    )
    by_rule = ([model for model in models if any(map(is_it, model.files))] for is_it in rules)
    return next((found for found in by_rule if found), [])


def _between(tag: str) -> re.Pattern[str]:
    """Finds `tag` between separators, in names in lower case."""
    return re.compile(rf"(?<![a-z0-9]){re.escape(tag.casefold())}(?![a-z0-9_])")


def _that_fit(models: Sequence[GgufModel], tag: str) -> list[GgufModel]:
    """The models that `tag` may mean, by the strictest rule that finds any."""
    wanted, has_tag = tag.casefold(), _between(tag)
    at_end = re.compile(rf"(?:.*[^a-z0-9])?{re.escape(wanted)}")
    is_quantisation = _QUANTISATION.fullmatch(tag) is not None

    def has_in_name(model: GgufModel) -> bool:
        kind = model.quantisation.casefold()
        if is_quantisation and kind:
            # Elsewhere in a name, a quantisation is that of other tensors, or of what the file was made from.
            return at_end.fullmatch(kind) is not None
        return has_tag.search(model.name.casefold()) is not None

    rules: tuple[Callable[[GgufModel], bool], ...] = (
        lambda model: model.quantisation.casefold() == wanted,
        has_in_name,
    )
    by_rule = ([model for model in models if fits(model)] for fits in rules)
    return next((found for found in by_rule if found), [])


def _tags(models: Sequence[GgufModel]) -> str:
    """What each of `models` is called behind a hub id."""
    return ", ".join(sorted(_tag(model, models) for model in models))


def _tag(model: GgufModel, models: Sequence[GgufModel]) -> str:
    """The shortest name of one of `models` behind a hub id: its quantisation, unless others have the same."""
    counts = Counter(other.quantisation.casefold() for other in models)
    is_told = model.quantisation and counts[model.quantisation.casefold()] == 1
    return model.quantisation if is_told else model.files[0]


def settings_beside(names: Iterable[str], folder: str = ".") -> list[str]:
    """Config, tokenizer and chat template among files: those that lie in `folder` itself."""
    return [
        name
        for name in names
        if PurePosixPath(name).parent == PurePosixPath(folder)
        and _is_like(_base(name), _SETTINGS)
        and not _is_like(_base(name), _NOT_SETTINGS)
    ]


def tokenizer_beside(names: Collection[str], model: GgufModel) -> list[str]:
    """What a GGUF's tokenizer is read from in place of its own metadata: the files beside it, if they have one."""
    beside = settings_beside(names, str(PurePosixPath(model.files[0]).parent))
    return beside if any(_base(name) == "tokenizer.json" for name in beside) else []


def has_only_gguf(names: Collection[str]) -> bool:
    """Whether GGUF models are all the weights there are: beside others they are quantised copies of these."""
    return bool(gguf_models(names)) and not any(name.endswith((".safetensors", *_PICKLES)) for name in names)


def no_weights(hub_id: str, label: str, names: Sequence[str]) -> UnsupportedModelError:
    """Say why a repository has no weights that are taken without a tag."""
    said = f"{label} has no {SINGLE} and no {INDEX}."
    models = gguf_models(names)
    safetensors = [name for name in names if name.endswith(".safetensors")]
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    others = passed_over(names, f"{hub_id}:")
    if models:
        said += (
            f" It has GGUF files beside other weights: {_tags(models)}. Name one: {hub_id}:{_tag(models[0], models)}."
        )
    elif safetensors:
        said += f" It has {safetensors[0]}, which no index names: not a checkpoint of transformers."
    elif pickles:
        said += f" It has pickled weights ({pickles[0]}), which are not read, as a pickle runs code.{others}"
    else:
        said += others or " It holds no weights at all."
    return UnsupportedModelError(said)


def _base(name: str) -> str:
    return PurePosixPath(name).name


def _is_like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
