"""Spoilt files of a checkpoint through the commands: one line and exit code 2, or success; never a traceback or a hang.

    python -m benchmarks.mutations [--each 60] [--commands generate plan pack serve load] [--keep]

Every file (benchmarks/spoilt_files.py) is tried with every command, in this process with a watchdog. A fault is an
exception that is not foreroute's own, more than one line on standard error, another exit code, or more than --seconds
of CPU (not of the clock, which other programs share).
The last line is JSON; exit code 1 where there are faults.
"""

import argparse
import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.spoilt_files import KINDS, Spoilt, spoil

COMMANDS = ("generate", "plan", "pack", "serve", "load")
# A run that takes this many times its limit by the clock is stopped.
_PATIENCE = 10
_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' + message['content'] }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Outcome:
    """What became of one file with one command. result: "ok", "error" or "fault"; said: its error, or what is wrong."""

    spoilt: Spoilt
    command: str
    result: str
    said: str
    seconds: float


class _TooSlow(BaseException):
    """The watchdog's; not an Exception, so that nothing takes it for an error of its own."""


def make_whole(root: Path) -> dict[str, Path]:
    """The checkpoints that files are spoilt of: a sharded one with everything beside it, and a GGUF file.

    Returns:
        For every kind of file, the folder.
    """
    import gguf

    from tests.formats.gguf_writer import write_gguf
    from tests.support.checkpoints import edit_json, random_model, save_checkpoint, save_tokenizer
    from tests.support.families import FAMILIES

    folder = save_checkpoint(random_model(FAMILIES["qwen3_moe"](), 0), root / "whole", "bf16", sharded=True)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    edit_json(
        folder / "generation_config.json", eos_token_id=[258, 7], do_sample=True, temperature=0.7, top_k=20, top_p=0.9
    )
    edit_json(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": _TEMPLATE}])
    _pack(folder)
    _fit(folder)
    write_gguf(root / "gguf", "qwen3moe", gguf.GGMLQuantizationType.Q8_0, seed=0)
    return {name: root / "gguf" if "gguf" in name else folder for name in KINDS}


def _pack(folder: Path) -> None:
    from foreroute.checkpoint.codecs import CODECS
    from foreroute.checkpoint.locate import read_index
    from foreroute.checkpoint.records import store_name
    from foreroute.kernels.ggml.library import open_library
    from foreroute.model.build.skeleton import outline
    from foreroute.prepare.pack import pack
    from foreroute.prepare.quantise import DenseQuantiser, Quantiser

    sketch = outline(folder, read_index(folder))
    library = open_library()
    quantiser = Quantiser(sketch.table, CODECS["q4_0"], library)
    dense, path = DenseQuantiser(sketch, library.types["Q8_0"], library), folder / store_name("q4_0", "q8_0")
    pack(sketch.table, path, progress=lambda done, total: None, quantiser=quantiser, dense=dense)


def _fit(folder: Path) -> None:
    """Predictors of random numbers: what is spoilt is what they say of themselves."""
    import torch

    from foreroute.checkpoint.locate import read_index
    from foreroute.predict.fitted import RidgeLayer, TokenTable
    from foreroute.predict.sidecar import SIDECAR_NAME, Sidecar
    from tests.support.families import VOCAB_SIZE

    layers, experts, hidden = 3, 16, 64
    ridge = [
        RidgeLayer(torch.rand(hidden, experts), torch.rand(experts + 1, experts), torch.rand(experts)) for _ in range(2)
    ]
    scores = {"recall_k": [0.9] * layers, "missed_mass": [0.1] * layers}
    Sidecar(
        read_index(folder).fingerprint(), [*ridge, None], [torch.rand(experts, hidden) for _ in range(layers)],
        TokenTable(torch.rand(VOCAB_SIZE, experts).half(), torch.rand(hidden, experts), torch.rand(hidden)),
        [torch.ones(experts, dtype=torch.int64) for _ in range(layers)], ["ridge", "ridge", None],
        {"held_out": {"ridge": scores, "token table": scores}, "settings": {"penalty": 0.1}},
    ).save(folder / SIDECAR_NAME)  # fmt: skip


def with_spoilt(whole: Path, spoilt: Spoilt, to: Path) -> Path:
    """A folder of links to the whole files, the spoilt one in its place; what a command is given."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    of_kind = KINDS[spoilt.kind]
    for path in whole.iterdir():
        # What is no part of this kind's run would only cost time: the store is asked for where it is spoilt.
        if path.name != spoilt.file and (path.suffix != ".foreroute" or path.name == of_kind.file):
            os.link(path, to / path.name)
    if spoilt.kind == "chat template":
        (to / "tokenizer_config.json").unlink()
        (to / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (to / spoilt.file).write_bytes(spoilt.content)
    return to / spoilt.file if spoilt.file.endswith(".gguf") else to


def arguments(command: str, model: Path, spoilt: Spoilt) -> list[str]:
    """The command line for the spoilt model."""
    packed = ["--packed", "q4_0-dense-q8_0"] if spoilt.kind == "store header" else []
    engine = ["--memory", "50%", *packed]
    if command == "generate":
        return ["generate", str(model), "What is this?", "--max-new-tokens", "3", "--json", *engine]
    if command == "pack":
        beside = ["--out", str(model.parent / "packed.foreroute")]
        return ["pack", str(model), "--json", *(["--quant", "q4_0", "--dense", "q8_0"] if packed else beside)]
    if command == "serve":
        return ["serve", str(model), "--port", "0", "--json", *engine]
    return ["plan", str(model), "--json", *engine]


def run(command: str, model: Path, spoilt: Spoilt, seconds: float) -> Outcome:
    """One file through one command, in this process."""
    started = time.process_time()
    with _captured() as read_error, _watched(seconds * _PATIENCE):
        try:
            code, wrong = _run(command, model, spoilt)
        except SystemExit as ended:
            code, wrong = ended.code, ""
        except _TooSlow:
            code, wrong = None, f"stopped after {seconds * _PATIENCE:g} s"
        except BaseException as error:  # every other exception is what is looked for
            if isinstance(error, KeyboardInterrupt):
                raise
            code, wrong = None, _last_frames(error)
        said = read_error()
    elapsed = time.process_time() - started
    lines = said.strip().splitlines()
    if not wrong and code not in (0, 2):
        wrong = f"exit code {code}"
    if not wrong and code == 2 and (len(lines) != 1 or not lines[0].startswith("foreroute: error: ")):
        wrong = f"{len(lines)} lines on standard error: {said[:300]}"
    if not wrong and elapsed > seconds:
        wrong = f"took {elapsed:.1f} s"
    result = "fault" if wrong else "ok" if code == 0 else "error"
    return Outcome(spoilt, command, result, wrong or said.strip(), elapsed)


def _run(command: str, model: Path, spoilt: Spoilt) -> tuple[Any, str]:
    if command != "load":
        from foreroute.cli.main import main

        with _serving_nobody():
            return main(arguments(command, model, spoilt)), ""
    import foreroute
    from foreroute.errors import ForerouteError

    packed = "q4_0-dense-q8_0" if spoilt.kind == "store header" else "auto"
    try:
        loaded = foreroute.load(model, "50%", config=foreroute.EngineConfig(packed=packed))
    except ForerouteError as error:
        print(f"foreroute: error: {error}", file=sys.stderr)
        return 2, ""
    loaded.foreroute.close()
    return 0, ""


def _last_frames(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:200]} ({where})"


@contextlib.contextmanager
def _serving_nobody() -> Iterator[None]:
    """`serve` loads its model and ends; templates are not rendered, so that no process is started for them."""
    import foreroute.server.run
    from foreroute.server.backend import Backend, Prompts

    def serve(backend: Backend, settings: Any, listening: Any, load: Callable[[Backend], None], more: Any) -> None:
        try:
            load(backend)
        finally:
            for one in listening:
                one.close()
            if backend.loaded is not None:
                backend.loaded.engine.close()
                backend.loaded.prompts.close()

    before = foreroute.server.run.serve, Prompts.start
    foreroute.server.run.serve, Prompts.start = serve, lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        foreroute.server.run.serve, Prompts.start = before  # type: ignore[method-assign]


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Standard output goes nowhere, standard error to a file: also what Rust and C write there."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr
    with tempfile.TemporaryFile() as errors, open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - closed below
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115

        def read() -> str:
            sys.stderr.flush()
            errors.seek(0)
            return errors.read().decode("utf-8", "replace")

        try:
            yield read
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            sys.stdout, sys.stderr = streams
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: types.FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Per kind of file: how many runs ended how, and the slowest."""
    rows = []
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.spoilt.kind == kind]
        counts = {name: sum(one.result == name for one in of_kind) for name in ("ok", "error", "fault")}
        slowest = max(of_kind, key=lambda one: one.seconds, default=None)
        if slowest is not None:
            rows.append({"kind": kind, "runs": len(of_kind), **counts, "slowest_s": round(slowest.seconds, 2)})
    return rows


def main() -> int:
    """Spoil, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=60, metavar="N", help="files of each kind (default: 60)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seconds", type=float, default=3.0, help="more than these is a fault (default: 3)")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/<date>-mutations.json")
    asked = parser.parse_args()
    import torch
    from transformers.utils import logging

    from benchmarks import _harness

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_whole(Path(scratch))
        for name in asked.kinds:
            for number in range(asked.each):
                spoilt = spoil(KINDS[name], folders[name], number)
                for command in asked.commands:
                    model = with_spoilt(folders[name], spoilt, Path(scratch) / "spoilt")
                    outcomes.append(run(command, model, spoilt, asked.seconds))
                    if outcomes[-1].result == "fault":
                        print(f"{name} {number} ({spoilt.what}), {command}: {outcomes[-1].said}", flush=True)
            print(table(outcomes)[-1], flush=True)
    faults = [one for one in outcomes if one.result == "fault"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    raw = {"faults": [[one.spoilt.kind, one.spoilt.number, one.command, one.said] for one in faults]}
    result = {"files": len(outcomes) // len(asked.commands), "faults": len(faults), "peak_rss_bytes": peak}
    _harness.record("mutations", {**result, "table": table(outcomes)}, raw, keep=asked.keep)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
