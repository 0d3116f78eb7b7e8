"""The packages, kernels and drivers that are installed, told without importing torch."""

import ctypes
import re
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS
from foreroute.cli.machine.findings import OK, PROBLEM, WARNING, Finding
from foreroute.kernels.ggml.library import GgmlError, Library, open_library

_CUDA_DRIVERS = ("libcuda.so.1", "nvcuda.dll")


def package_findings() -> list[Finding]:
    """Whether what foreroute needs is installed in the versions that it asks for."""
    try:
        needs = metadata.requires("foreroute") or []
    except metadata.PackageNotFoundError:
        return [Finding("packages", WARNING, "foreroute runs from a folder and is not installed", "pip install -e .")]
    from packaging.requirements import Requirement

    wrong, right = [], []
    for need in map(Requirement, needs):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        version = _version(need.name)
        if version and need.specifier.contains(version, prereleases=True):
            right.append(f"{need.name} {version}")
            continue
        has = f"{need.name} {version}" if version else f"no {need.name}"
        wrong.append(Finding("packages", PROBLEM, has, f"pip install '{need.name}{need.specifier}'"))
    named = [one for one in right if one.split()[0] in ("torch", "transformers")]
    told = f"{len(right)} as needed ({', '.join(sorted(named))}), Python {'.'.join(map(str, sys.version_info[:3]))}"
    return wrong or [Finding("packages", OK, told)]


def extra_findings() -> list[Finding]:
    """What is installed for commands that need more."""
    found = []
    for module, what, extra in (("fastapi", "the server", "serve"), ("llguidance", "structured output", "structured")):
        if util.find_spec(module) is None:
            found.append(Finding(extra, OK, f"{what} is not installed", f"pip install 'foreroute[{extra}]', if wanted"))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def ggml_finding(opening: Callable[[], Library] = open_library) -> Finding:
    """Which library of ggml's kernels is used, and which of the types in GGUF files it multiplies."""
    try:
        library = opening()
    except GgmlError as error:
        return Finding("ggml", WARNING, "its kernels are not used: torch dequantises, which is slower", str(error))
    lacking = sorted({*EXPERT_BLOCKS} - {*library.types})
    told = f"{library.version} in {library.folder}, {len({*EXPERT_BLOCKS} & {*library.types})} types of blocks"
    if not lacking:
        return Finding("ggml", OK, told)
    return Finding("ggml", WARNING, told, f"{', '.join(lacking)} are dequantised by torch, which is slower.")


def cuda_finding(find_driver: Callable[[], ctypes.CDLL | None] | None = None) -> Finding:
    """Whether --device cuda can work: torch's build, and what NVIDIA's driver counts."""
    build, driver = _torch_cuda(), (find_driver or _driver)()
    if driver is None:
        return Finding("CUDA", OK, "there is no NVIDIA driver: --device cpu")
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(version))
    told = f"{count.value} GPUs, driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if code or not count.value:
        return Finding("CUDA", WARNING, f"a driver, and no GPU (code {code})", "For --device cuda look at nvidia-smi.")
    if build is None:
        advice = "For --device cuda install torch's CUDA build: https://pytorch.org/get-started/locally"
        return Finding("CUDA", WARNING, f"{told}; torch is a CPU build", advice)
    if int(build.partition(".")[0]) > version.value // 1000:
        return Finding(
            "CUDA", WARNING, f"{told}; torch is built for CUDA {build}", "Update the driver, for --device cuda."
        )
    return Finding("CUDA", OK, f"{told}; torch is built for CUDA {build}")


def _driver() -> ctypes.CDLL | None:
    for name in _CUDA_DRIVERS:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built for, read from its file; None for a build without."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return None if found is None else found[1]
