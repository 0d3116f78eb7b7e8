"""Try grammars in processes of their own (trial.py), and tell apart why one fails there."""

import json
import signal
import subprocess
import threading

from foreroute.children import child_command, child_environment
from foreroute.errors import ForerouteError, GrammarError, QueueFullError

# Seconds of the processor; of the clock, on a machine that is busy, many more.
_MOST_BYTES, _MOST_S, _WAIT_S = 160 * 2**20, 5, 60
_OUT_OF_MEMORY = (b"memory allocation", b"MemoryError", b"bad_alloc")
# Of a stack that overflows, or a fault in the compiler.
_CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGTRAP", "SIGFPE")


class Trials:
    """Tries grammars. Its methods may be called from any thread, each call starts a process."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def attempt(self, text: str) -> str:
        """Try a grammar, as llguidance reads it; blocks for some 0.1 s, and for seconds where it is very large.

        Returns:
            What llguidance says against it; "" where it can be compiled.
        Raises:
            GrammarError: it takes too much, or the compiler crashes on it.
            QueueFullError: the machine is too busy to tell, or the server is stopping.
            ForerouteError: the process fails for another reason, which is no fault of the grammar.
        """
        trial = self._start()
        try:
            out, err = trial.communicate(text.encode(), timeout=_WAIT_S)
        except subprocess.TimeoutExpired:
            raise QueueFullError("The machine is too busy to compile the grammar. Try again later.") from None
        finally:
            trial.kill()
            trial.wait()
            with self._lock:
                self._running.discard(trial)
        if trial.returncode:
            raise self._why(trial.returncode, err)
        said: dict[str, str] = json.loads(out)
        return said.get("error", "")

    def close(self) -> None:
        """End those that run, and start no more."""
        with self._lock:
            self._is_closed = True
            for trial in self._running:
                trial.kill()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._is_closed:
                raise QueueFullError("The server is shutting down.")
            trial = subprocess.Popen(
                child_command("foreroute.structured.trial", _MOST_BYTES, _MOST_S),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=child_environment(),
                start_new_session=True,  # Ctrl-C is for the server alone
            )
            self._running.add(trial)
            return trial

    def _why(self, code: int, err: bytes) -> ForerouteError:
        """Say why the process has failed, by how it ended and what it wrote."""
        try:
            by = signal.Signals(-code).name
        except ValueError:
            by = ""
        if self._is_closed:
            return QueueFullError("The server is shutting down.")
        if by in ("SIGKILL", "SIGXCPU"):
            return GrammarError(f"It takes more than {_MOST_S} s to be compiled. Make it smaller.")
        if any(sign in err for sign in _OUT_OF_MEMORY):
            return GrammarError(f"It takes more than {_MOST_BYTES >> 20} MiB to be compiled. Make it smaller.")
        if by in _CRASHES:
            return GrammarError(
                f"The compiler ends on it ({by}), most likely as it is nested too deep. Make it simpler."
            )
        last = err.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
        return ForerouteError(f"The process that tries grammars fails ({by or f'exit {code}'}): {last or 'no reason'}")
