"""Check before anything is loaded that the device can do what is asked; errors say what to change."""

import importlib.util

import torch

from foreroute.config import EngineConfig
from foreroute.errors import DeviceError
from foreroute.policy import Policy

# Kernels are compiled for it by Triton, and bf16 is computed natively from here on.
_LEAST_CAPABILITY = (8, 0)
_ON_THE_CPU = "Or leave --device out: the model runs on the CPU."


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
    if on_device and Policy.parse(asked.policy) != Policy.parse("exact"):
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
