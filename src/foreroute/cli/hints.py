"""Say what was meant where a command or a flag is not known: spellings of other tools, and near misses."""

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence

# Flags of llama.cpp, ollama, vLLM and transformers, by ours. Only those that a command has are suggested.
_FLAGS: Mapping[str, tuple[str, ...]] = {
    "--max-new-tokens": (
        "-n", "--n-predict", "--predict", "--num-predict", "--max-tokens", "--max-length", "--max-gen-toks",
    ),
    "--ctx-size": ("-c", "--n-ctx", "--num-ctx", "--context", "--context-length", "--max-seq-len"),
    "--threads": ("-t", "--n-threads", "--num-threads", "--num-thread"),
    "--seed": ("-s",),
    "--file": ("-f", "--prompt-file"),
    "--repetition-penalty": ("--repeat-penalty",),
    "--system": ("-sys", "--system-prompt", "--system-prompt-file"),
    "--max-num-seqs": ("-np", "--parallel", "--num-parallel"),
    "--memory": (
        "--ram", "--max-memory", "--cpu-offload-gb", "--gpu-memory-utilization", "--cache-ram", "--n-cpu-moe", "-ncmoe",
        "--cpu-moe", "-cmoe",
    ),
    "--device": ("-ngl", "--gpu-layers", "--n-gpu-layers", "--num-gpu", "-dev"),
    "--served-model-name": ("-a", "--alias"),
    "--prefill-chunk": ("-b", "--batch-size", "-ub", "--ubatch-size", "--max-num-batched-tokens"),
    "--debug": ("-v", "--verbose", "--log-verbose"),
    "--quiet": ("-q", "--no-display-prompt"),
    "--chat": ("-cnv", "--conversation", "--jinja"),
    "--no-chat": ("-no-cnv", "--no-conversation"),
    "--quant": ("--quantization", "--quantize", "--load-in-4bit", "--load-in-8bit", "--outtype"),
}  # fmt: skip
_OURS = {other: own for own, others in _FLAGS.items() for other in others}
# Where a flag stands for something that is no flag here.
_PROMPT = 'the prompt has no flag: write it after the model, foreroute generate MODEL "..."'
_SAID = {
    "-p": _PROMPT, "--prompt": _PROMPT,
    "-m": "the model has no flag: write it first", "--model": "the model has no flag: write it first",
    "-hf": "write the hub id in place of MODEL: org/name, or org/name:Q4_K_M",
    "--hf-repo": "write the hub id in place of MODEL: org/name, or org/name:Q4_K_M",
    "-i": "foreroute chat MODEL is a conversation", "--interactive": "foreroute chat MODEL is a conversation",
    "--stream": "text is streamed as it is generated",
    "--mlock": "leave it out: experts in memory are held by foreroute itself",
    "--no-mmap": "leave it out: experts are read with O_DIRECT, not mapped",
    "--tensor-parallel-size": "leave it out: a model is one process on one device",
    "--quantization": "a quantised model is read as it is stored; foreroute pack MODEL --quant q4_k makes one",
    "--load-in-4bit": "a quantised model is read as it is stored; foreroute pack MODEL --quant q4_k makes one",
    "--load-in-8bit": "a quantised model is read as it is stored; foreroute pack MODEL --quant q8_0 makes one",
}  # fmt: skip
# Commands of other tools, by what does it here.
_COMMANDS = {
    "cli": "generate or chat", "complete": "generate",
    "server": "serve", "start": "serve", "api": "serve", "ls": "list", "models": "list", "ps": "list",
    "download": "pull", "get": "pull", "info": "show", "inspect": "show", "convert": "pack", "quantize": "pack",
    "quantise": "pack", "benchmark": "bench", "evaluate": "eval", "train": "fit", "check": "verify",
    "test": "verify", "remove": "rm", "delete": "rm", "uninstall": "rm",
}  # fmt: skip


def flag_hint(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Suggest what the first of the `unknown` arguments means in the command of `parser`; "" where nothing is near."""
    flags = {option for action in parser._actions for option in action.option_strings}
    for argument in unknown:
        name = argument.partition("=")[0].replace("_", "-")
        if not name.startswith("-"):
            continue
        if own := next(iter(_own_flags(name, flags)), None):
            return f"Did you mean {own}?"
        if name in _SAID:
            return f"{name}: {_SAID[name]}."
    return ""


def _own_flags(name: str, flags: set[str]) -> Iterable[str]:
    """Flags of the command that `name` may mean, the likeliest first."""
    if name in flags:  # spelt with underscores
        yield name
    if _OURS.get(name) in flags:
        yield _OURS[name]
    if name.startswith("--") and name not in _SAID:
        yield from difflib.get_close_matches(name, sorted(flags), 1, 0.75)


def command_hint(unknown: str, commands: Iterable[str]) -> str:
    """Suggest a command in place of `unknown`: what other tools call so, or the nearest name; "" where none is near."""
    near = difflib.get_close_matches(unknown, sorted(commands), 1, 0.6)
    meant = _COMMANDS.get(unknown) or (near[0] if near else "")
    return f"Did you mean foreroute {meant}?" if meant else ""
