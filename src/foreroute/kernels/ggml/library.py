"""Find ggml's shared libraries, check that they are the version that types.py describes, and open them once.

They come from the folder that FOREROUTE_GGML names, from the package `libggml-python`, or from an installed
llama-cpp-python whose ggml is one of those versions. What cannot be used is refused by name (`GgmlError`), and the
torch backend dequantises in its place. Only the pinned package is opened unseen: what another build would do, such as
to end the process, it does first in a process of its own (known_answers.py).
"""

import ctypes as c
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from foreroute.errors import ForerouteError
from foreroute.kernels.ggml.types import (
    BASE_FUNCTIONS,
    CPU_FUNCTIONS,
    TYPE_NUMBERS,
    Address,
    BlockType,
    LogCallback,
    Tensor,
    TypeTraits,
)

# The minors whose structs and functions are as types.py describes them, by their headers; patches keep them. The
# pinned package has the first, llama-cpp-python 0.3.36 the second.
_VERSIONS = ("0.20.", "0.25.")
_FOLDER_VARIABLE = "FOREROUTE_GGML"
_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
_PREFIX = "" if sys.platform == "win32" else "lib"
# sizeof(struct ggml_object), which ggml_tensor_overhead() counts with each tensor.
_OBJECT_BYTES = 32
# ggml's warnings and errors.
_TOLD_LEVELS = (3, 4)
_REPACK_BUFFER = b"CPU_REPACK"
# Exit code of known_answers.py where it refuses the libraries, and how long it may take.
REFUSED = 3
_TRIAL_S = 120


class GgmlError(ForerouteError):
    """ggml's kernels cannot be used here; the message says why."""


class Library:
    """ggml's functions as attributes (`library.ggml_mul_mat`), and what its build supports.

    Args:
        folder: with libggml-base and libggml-cpu.
    Attributes:
        folder, version: of the libraries.
    Raises:
        GgmlError: absent, broken, of another version, or with other structs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base, cpu = _open(folder, "ggml-base"), _open(folder, "ggml-cpu")
        self._declare(base, "ggml-base", BASE_FUNCTIONS)
        self._declare(cpu, "ggml-cpu", CPU_FUNCTIONS)
        self.version: str = self.ggml_version().decode()
        if not self.version.startswith(_VERSIONS):
            called = " and ".join(f"{one}x" for one in _VERSIONS)
            raise GgmlError(f"{folder} holds ggml {self.version}; foreroute calls {called}. {_INSTALL}")
        if self.ggml_tensor_overhead() != c.sizeof(Tensor) + _OBJECT_BYTES:
            raise GgmlError(f"{folder}: ggml {self.version} was built with other structs. {_INSTALL}")
        self.ggml_log_set(_LOG, None)
        self.ggml_cpu_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml has no {name} in types.py")

    def _declare(self, library: c.CDLL, name: str, functions: dict[str, tuple[object, list[object]]]) -> None:
        for function_name, (result, arguments) in functions.items():
            function = getattr(library, function_name, None)
            if function is None:
                raise GgmlError(f"{self.folder}: lib{name} lacks {function_name}. {_INSTALL}")
            function.restype, function.argtypes = result, arguments
            self.__dict__[function_name] = function

    @cached_property
    def types(self) -> dict[str, BlockType]:
        """The types that this build has, by name."""
        found = {}
        for name, number in TYPE_NUMBERS.items():
            spelled = self.ggml_type_name(number)
            if spelled is not None and spelled.decode().upper() == name:
                found[name] = BlockType(name, number, self.ggml_blck_size(number), self.ggml_type_size(number))
        return found

    def traits(self, name: str) -> TypeTraits:
        """The functions of a type."""
        traits: TypeTraits = self.ggml_get_type_traits(TYPE_NUMBERS[name]).contents
        return traits

    def to_float(self, name: str) -> Callable[[int, int, int], None]:
        """A type's dequantiser: (address of blocks, address of floats, number of weights)."""
        if name == "F32":
            return _copy_floats
        convert: Callable[[int, int, int], None] = self.traits(name).to_float
        return convert

    @cached_property
    def repack_buffer_type(self) -> int | None:
        """ggml's buffer type of matrices with eight rows side by side; None where this build has none."""
        registry = self.ggml_backend_cpu_reg()
        device = self.ggml_backend_reg_dev_get(registry, 0)
        address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        found = c.CFUNCTYPE(c.POINTER(Address), Address)(address)(device)
        at = 0
        while found and found[at]:
            if self.ggml_backend_buft_name(found[at]) == _REPACK_BUFFER:
                return found[at]
            at += 1
        return None


def _log(level: int, text: bytes, _: object) -> None:
    if level in _TOLD_LEVELS:
        logging.getLogger("foreroute.ggml").warning(text.decode(errors="replace").strip())


# Kept as long as the process, as ggml calls it.
_LOG = LogCallback(_log)


def _copy_floats(blocks: int, floats: int, count: int) -> None:
    c.memmove(floats, blocks, 4 * count)


_PINNED = "0.20.2.post1"
_INSTALL = f"Install it as foreroute does: pip install 'libggml-python=={_PINNED}'."
_CPU_INFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def open_library() -> Library:
    """Open the libraries once for the process.

    Raises:
        GgmlError: see `Library`.
    """
    folder, is_pinned = _provider()
    if is_pinned:
        _check_cpu()
    else:
        try_out(folder)
    return Library(folder)


def try_out(
    folder: Path, command: Sequence[str] = (sys.executable, "-m", "foreroute.kernels.ggml.known_answers")
) -> None:
    """Open the libraries of `folder` in a process of its own, and compare their numbers there for every type.

    Args:
        command: the program, which is given the folder.
    Raises:
        GgmlError: they cannot be used; or the process ended in another way, which is said.
    """
    # This very package, wherever it was imported from.
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    try:
        ran = subprocess.run([*command, str(folder)], capture_output=True, timeout=_TRIAL_S, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GgmlError(f"{folder}: its ggml could not be tried out: {error}. {_INSTALL}") from error
    if ran.returncode == 0:
        return
    said = ran.stderr.decode(errors="replace").strip()
    if ran.returncode == REFUSED:
        raise GgmlError(said)
    told = said.splitlines()[-1] if said else "it said nothing"
    how = f"signal {-ran.returncode}" if ran.returncode < 0 else f"exit code {ran.returncode}"
    raise GgmlError(f"{folder}: its ggml ended the process that tried it out ({how}: {told:.200}). {_INSTALL}")


def _provider() -> tuple[Path, bool]:
    """The folder to open, and whether it is that of the pinned package."""
    asked = os.environ.get(_FOLDER_VARIABLE)
    if asked:
        folder = Path(asked).expanduser()
        if not folder.is_dir():
            raise GgmlError(f"{_FOLDER_VARIABLE} is {asked}, which is no folder. Give the one with libggml-base.")
        return folder, False
    root = _package("libggml")
    if root is not None:
        folder = next((root / name for name in ("lib64", "lib", "bin") if (root / name).is_dir()), root)
        return folder, _installed_version() == _PINNED
    root = _package("llama_cpp")
    if root is not None and _file(root / "lib", "ggml-base").is_file():
        return root / "lib", False
    raise GgmlError(f"libggml-python is not installed. {_INSTALL}")


def _package(name: str) -> Path | None:
    """Where a package is installed; it is not imported."""
    found = util.find_spec(name)
    locations = None if found is None else found.submodule_search_locations
    return Path(locations[0]) if locations else None


def _installed_version() -> str:
    try:
        return metadata.version("libggml-python")
    except metadata.PackageNotFoundError:
        return ""


def _file(folder: Path, name: str) -> Path:
    return folder / f"{_PREFIX}{name}.{_SUFFIX}"


def _open(folder: Path, name: str) -> c.CDLL:
    path = _file(folder, name)
    if not path.is_file():
        raise GgmlError(f"{path} is not there. {_INSTALL}")
    try:
        # Global, so that libggml-cpu finds the functions of libggml-base wherever it looks for that file.
        return c.CDLL(str(path), c.RTLD_GLOBAL)
    except OSError as error:
        raise GgmlError(f"{path} cannot be opened: {error}. {_INSTALL}") from error


def _check_cpu() -> None:
    """The package's build uses AVX2 without asking; on another CPU its first product would end the process."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not _CPU_INFO.is_file():
        return
    lines = _CPU_INFO.read_text("utf-8", "replace").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    missing = [flag for flag in ("avx2", "fma", "f16c", "bmi2") if flag not in flags.split()]
    if missing:
        raise GgmlError(
            f"This CPU lacks {', '.join(missing)}, for which libggml-python was built. {_FOLDER_VARIABLE} may name the "
            "folder of a build without."
        )
