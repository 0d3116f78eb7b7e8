"""How processes of our own are started, which work on what a stranger wrote: chat templates and grammars.

They get none of this process's secrets, and no code of the working folder: with `cd MODEL; foreroute serve .` that is
untrusted, and a jinja2.py in it would run (Python's -P needs 3.11).
"""

import os
import sys
from pathlib import Path

# Where Python and its libraries are, how they read and write text, and how many threads they start. Keys and tokens
# have any name, so that only what is known to be needed is handed on.
_NEEDED = frozenset({
    "HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV",
    "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "PYTHONHOME", "PYTHONIOENCODING", "PYTHONNOUSERSITE", "PYTHONPATH",
    "PYTHONPYCACHEPREFIX", "PYTHONUSERBASE", "PYTHONUTF8", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
    # Of Windows, which starts no process without some of them.
    "APPDATA", "COMSPEC", "LOCALAPPDATA", "PATHEXT", "SYSTEMDRIVE", "SYSTEMROOT", "TEMP", "TMP", "USERPROFILE",
    "WINDIR",
})  # fmt: skip
_HERE = str(Path(__file__).parents[1])


def child_command(module: str, *arguments: object) -> list[str]:
    """Return the command that runs `main()` of one of our modules, of this version, in a process of its own."""
    start = (
        f"import sys; here = {_HERE!r}; found = [folder for folder in sys.path if folder]; "
        "sys.path[:] = found if here in found else [here, *found]; "
        f"from {module} import main; main()"
    )
    return [sys.executable, "-c", start, *map(str, arguments)]


def child_environment() -> dict[str, str]:
    """Return the environment of such a process: what Python needs, and nothing else."""
    return {name: value for name, value in os.environ.items() if name.upper() in _NEEDED or name.startswith("LC_")}
