"""Check what `load` is asked for before anything is loaded: its arguments, and that the device can do it.

Each argument is honoured, or refused by name with what to do instead. Most names are those of transformers'
from_pretrained, which users know. One that has no effect here is accepted if its value asks for what happens anyway,
and refused if it asks for something else.
"""

import difflib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from foreroute.checkpoint.hub.fetch import HubAccess
from foreroute.config import EngineConfig
from foreroute.errors import DeviceError, ForerouteError, PolicyError
from foreroute.policy import Policy
from foreroute.units import parse_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB = ("token", "local_files_only", "cache_dir")
_OWN = ("path_or_hub_id", "memory", "dtype", "config", "device", "revision", "progress", "torch_dtype")

_MEMORY = "memory= is the budget of the experts; the rest of the model stays in memory"
_READ = "experts are read from the checkpoint itself, or from a packed store (EngineConfig(packed=...))"
_FILES = "name the folder that holds config.json and model.safetensors"
_QUANTISED = "a quantised checkpoint is read as it is stored (docs/formats.md); `foreroute pack --quant` makes one"
_ONE = "a model is one process on one device: device= is cpu or cuda"
_ENVIRONMENT = "downloads heed HF_ENDPOINT, HTTPS_PROXY and what else huggingface_hub reads from the environment"
_WEIGHTS = "weights come from the checkpoint's safetensors files alone"
# Of transformers' from_pretrained: the values that say what happens anyway, and what to do in place of another one.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "device_map": ((None,), 'device="cuda" is for a GPU; experts come from the disk whatever the device'),
    "max_memory": ((None,), _MEMORY),
    "offload_folder": ((None,), _READ),
    "offload_state_dict": ((None, False), _READ),
    "offload_buffers": ((None, False), _READ),
    "low_cpu_mem_usage": ((None, True), "a model here never has all its weights in memory"),
    "key_mapping": ((None,), "names of tensors are translated as transformers does it; rename those of the checkpoint"),
    "state_dict": ((None,), _WEIGHTS),
    "use_safetensors": ((None, True), _WEIGHTS),
    "weights_only": ((None, True), _WEIGHTS),
    "from_tf": ((None, False), _WEIGHTS),
    "from_flax": ((None, False), _WEIGHTS),
    "gguf_file": ((None,), "give the path of the .gguf file in place of the folder's"),
    "subfolder": ((None, ""), _FILES),
    "variant": ((None,), _FILES),
    "ignore_mismatched_sizes": ((None, False), "a tensor of another shape is another model's"),
    "output_loading_info": ((None, False), "what is missing or unexpected is an error"),
    "trust_remote_code": ((None, False), "code of a checkpoint is not run"),
    "code_revision": ((None,), "code of a checkpoint is not run"),
    "quantization_config": ((None,), _QUANTISED),
    "load_in_8bit": ((None, False), _QUANTISED),
    "load_in_4bit": ((None, False), _QUANTISED),
    "tp_plan": ((None,), _ONE),
    "tp_size": ((None,), _ONE),
    "device_mesh": ((None,), _ONE),
    "distributed_config": ((None,), _ONE),
    "experts_implementation": ((None, "eager"), "experts are computed here, with the bits of the eager ones"),
    "use_kernels": ((None, False), "kernels from the hub are not run"),
    "adapter_kwargs": ((None,), "merge an adapter into the weights (peft's merge_and_unload)"),
    "generation_config": ((None,), "set model.generation_config on what load returns"),
    "force_download": ((None, False), "remove the model from the hub's cache, and it is fetched again"),
    "resume_download": (
        (None, False, True),
        "files that are whole in the cache are kept, and one that was cut off begins anew",
    ),
    "proxies": ((None,), _ENVIRONMENT),
    "mirror": ((None,), _ENVIRONMENT),
    "use_auth_token": ((None,), "it is called token now"),
}

# Kernels are compiled for it by Triton, and bf16 is computed natively from here on.
_LEAST_CAPABILITY = (8, 0)
_ON_THE_CPU = "Or leave --device out: the model runs on the CPU."


@dataclass(frozen=True)
class Arguments:
    """The checked arguments of a call of `load`.

    config: with the call's own memory and device. dtype: the compute dtype, or "auto". hub: how a hub id is fetched.
    model_kwargs: for transformers.
    """

    config: EngineConfig
    dtype: torch.dtype | str
    hub: HubAccess
    model_kwargs: dict[str, Any]


def read_arguments(
    path_or_hub_id: Any,
    memory: Any,
    dtype: Any,
    config: Any,
    device: Any,
    revision: Any,
    progress: Any,
    others: Mapping[str, Any],
) -> Arguments:
    """Check all arguments of `load`; nothing is read or loaded.

    Args:
        others: keyword arguments beyond the signature.
    Raises:
        ForerouteError: an argument of the wrong type, an unknown one, or one that cannot be honoured.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike) or not os.fspath(path_or_hub_id):
        raise ForerouteError(
            f"load({path_or_hub_id!r:.60}): give the folder of a checkpoint, a GGUF file, or a hub id (org/name)."
        )
    if not isinstance(config, EngineConfig | None):
        raise ForerouteError(
            f"config is a {type(config).__name__}: give foreroute.EngineConfig({_as_fields(config)}). The model's own "
            "is config.json."
        )
    if not isinstance(revision, str | None):
        raise ForerouteError(f"revision is {revision!r:.60}: give a branch, a tag or a commit of a hub id.")
    if not callable(progress):
        raise ForerouteError(f"progress is {progress!r:.60}: give a function of (bytes read, bytes to read).")
    for name, value in others.items():
        _check_other(name, value)
    asked = config or EngineConfig()
    if memory is not None:
        # Whether it is an amount; a share is of what the model has.
        parse_memory(memory, 2**62)
        asked = replace(asked, memory=memory)
    if device is not None:
        asked = replace(asked, device=_device(device))
    attention = others.get("attn_implementation")
    return Arguments(
        asked,
        _dtype(dtype, others.get("torch_dtype")),
        _hub(others),
        {} if attention is None else {"attn_implementation": attention},
    )


def _check_other(name: str, value: Any) -> None:
    if name in (*_HUB, "torch_dtype"):
        return
    if name == "attn_implementation":
        if not isinstance(value, str | dict | None):
            raise ForerouteError(f'attn_implementation is {value!r:.60}: give "sdpa" or "eager".')
        if "/" in str(value):
            raise ForerouteError(f"attn_implementation={value!r:.60}: kernels from the hub are not run.")
        return
    if name in _REFUSED:
        harmless, advice = _REFUSED[name]
        if not any(type(value) is type(one) and value == one for one in harmless):
            # What may be a secret is not shown.
            shown = "" if name in ("use_auth_token", "proxies") else f"={value!r:.60}"
            raise ForerouteError(f"load takes no {name}{shown}: {advice}.")
        return
    switches = {option.name: option.metadata["choices"] for option in fields(EngineConfig)}
    if name in switches:
        allowed = f" ({', '.join(switches[name])})" if switches[name] else ""
        raise ForerouteError(
            f"{name} is a field of EngineConfig{allowed}: "
            f"load(..., config=foreroute.EngineConfig({name}={value!r:.60}))."
        )
    near = difflib.get_close_matches(name, [*_OWN, *_HUB, "attn_implementation", *switches], 1)
    place = ", a field of EngineConfig," if near and near[0] in {*switches} - {*_OWN} else ""
    hint = f" Is {near[0]}{place} meant?" if near else ""
    raise ForerouteError(f"load has no argument {name}.{hint} Its own are {', '.join(_OWN[:-1])}; see help(load).")


def _as_fields(config: Any) -> str:
    """The arguments of an EngineConfig in place of a mapping of its fields; "..." for anything else."""
    known = {option.name for option in fields(EngineConfig)}
    if not isinstance(config, Mapping) or not config or not known.issuperset(config):
        return "..."
    return f"{', '.join(f'{name}={value!r}' for name, value in config.items()):.200}"


def _dtype(dtype: Any, torch_dtype: Any) -> torch.dtype | str:
    """Return the compute dtype; `torch_dtype` is its older name in transformers."""
    if torch_dtype is not None:
        if dtype not in ("auto", None) and _one_dtype(dtype) != _one_dtype(torch_dtype):
            raise ForerouteError(f"dtype={dtype} and torch_dtype={torch_dtype} are different. Give dtype alone.")
        dtype = torch_dtype
    return _one_dtype(dtype)


def _one_dtype(dtype: Any) -> torch.dtype | str:
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return "auto"
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _DTYPES.values():
        raise ForerouteError(f"dtype {dtype!r:.60} is not one to compute in. Choose auto, {', '.join(_DTYPES)}.")
    return found


def _device(device: Any) -> str:
    """Return the kind of device, for EngineConfig, which checks it. Of several GPUs the current one is used."""
    if not isinstance(device, str | torch.device):
        raise ForerouteError(f'device is {device!r:.60}: give "cpu" or "cuda".')
    kind, _, number = str(device).partition(":")
    is_other = number not in ("", "0") or (kind == "cuda" and number == "0" and _current_gpu() != 0)
    if is_other and kind == "cuda":
        raise ForerouteError(
            f'device is {str(device)!r}: "cuda" is the current GPU. Make another one the current with '
            "torch.cuda.set_device or CUDA_VISIBLE_DEVICES."
        )
    return kind


def _current_gpu() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _hub(others: Mapping[str, Any]) -> HubAccess:
    token, is_local, cache_dir = (others.get(name) for name in _HUB)
    kinds: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
        (
            "token",
            token,
            lambda one: isinstance(one, str | bool | None),
            "a token of the hub, or True for the saved one",
        ),
        ("local_files_only", is_local, lambda one: isinstance(one, bool | None), "true or false"),
        ("cache_dir", cache_dir, lambda one: isinstance(one, str | os.PathLike | None), "a folder"),
    )
    for name, value, fits, wanted in kinds:
        if not fits(value):
            # Not its value, which may be a secret.
            raise ForerouteError(f"{name} is a {type(value).__name__}: give {wanted}.")
    return HubAccess(token, bool(is_local), None if cache_dir is None else Path(cache_dir).expanduser())


def open_device(asked: EngineConfig) -> torch.device:
    """Return the device that the configuration asks for, ready to be used.

    Raises:
        DeviceError: no CUDA, a driver that is too old, a GPU that is, or no Triton where it is needed.
    """
    _check_asked(asked)
    if asked.device == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise DeviceError(
            "--device cuda: this PyTorch was built without CUDA. Install one that was (pytorch.org, the wheels named "
            f"after CUDA). {_ON_THE_CPU}"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(_why_no_cuda(str(error))) from error
    if torch.cuda.device_count() == 0:
        raise DeviceError(f"--device cuda: no GPU is visible. See nvidia-smi and CUDA_VISIBLE_DEVICES. {_ON_THE_CPU}")
    device = torch.device("cuda", torch.cuda.current_device())
    if asked.control == "device":
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            raise DeviceError(
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; the "
                "kernels of --control device need 8.0 (Ampere) or later. Use --control host."
            )
        _check_triton()
    return device


def _check_asked(asked: EngineConfig) -> None:
    """Refuse what no device supports."""
    on_device = asked.device == "cuda" or asked.control == "device"
    is_exact = Policy.parse(asked.policy).is_exact
    if asked.draft is not None and on_device:
        raise DeviceError(
            "--draft: drafts are verified on the CPU alone so far. Leave --draft out, or --device and --control."
        )
    if asked.draft is not None and not is_exact:
        raise PolicyError(
            f"--draft needs the policy exact: under {asked.policy}, drafted tokens would decide which experts are "
            "resident, and so the output. Leave one of them out."
        )
    if on_device and not is_exact:
        raise DeviceError(
            f"--policy {asked.policy} is not supported yet with experts on a GPU: use exact, or leave --device out."
        )
    if on_device and asked.predictor not in ("auto", "no"):
        raise DeviceError(
            "Fitted predictors are not supported yet with experts on a GPU: leave --predictor out (the "
            "lookahead is used), or leave --device out."
        )
    if asked.control == "device" and (not asked.cache or asked.trace is not None or asked.deterministic):
        raise DeviceError(
            "With --control device nothing on the host sees or times a step: --no-cache, --trace and --deterministic "
            "need --control host."
        )


def _why_no_cuda(said: str) -> str:
    reason = said.strip().splitlines()[0] if said.strip() else "CUDA does not start"
    if "too old" in said:
        return (
            f"--device cuda: {reason} This PyTorch is built for CUDA {torch.version.cuda}: update the driver, or "
            f"install a PyTorch for an older CUDA. {_ON_THE_CPU}"
        )
    if "no NVIDIA driver" in said:
        return f"--device cuda: no NVIDIA driver is found here ({reason}). Install it. {_ON_THE_CPU}"
    return f"--device cuda: {reason}. See nvidia-smi. {_ON_THE_CPU}"


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise DeviceError("--control device runs Triton kernels: pip install triton. Or use --control host.")
