"""The same GGUF files through foreroute and llama.cpp: greedy tokens, and how far apart their distributions lie.

    python -m benchmarks.beside_llama_cpp --peers-python build/peers/bin/python

For each type a file is made of models/foreroute-tiny, whose rows of 192 and 64 weights take blocks of 32 (so Q4_0, not
Q4_K): everything but vectors and routers is in it. 100 prompts of the evaluation's tasks go on for 32 tokens, greedily,
in both engines; then both are fed foreroute's tokens, and their logits are compared. llama.cpp runs as it comes, with
keys and values in F16 ("llama.cpp"), and with them in F32 as foreroute keeps them ("llama.cpp-f32"). Beside them runs
foreroute's other math (--math torch, the dequantised numbers in float32), also on text of this repository.

A prompt's first token that differs is listed with the gap of the two likeliest logits in both engines: where that is
less than --tie, it counts as a tie.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]
MODEL = REPOSITORY / "models" / "foreroute-tiny"
TEXTS = ("README.md", "docs/structure.md", "docs/limitations.md", "docs/policies.md")
WINDOWS, WINDOW_TOKENS = 16, 256
LLAMA = {"llama.cpp": "f16", "llama.cpp-f32": "f32"}


@dataclass(frozen=True)
class Said:
    """One engine's answers: tokens [prompts, new], and the logits [prompts, new, vocabulary] they were chosen from."""

    tokens: np.ndarray
    logits: np.ndarray


# ------------------------------------------------------------------------------------------ in llama.cpp's interpreter
def run_llama(job: Mapping[str, Any]) -> None:
    """Answer every prompt of `job` and write the tokens and logits to its file."""
    import llama_cpp
    from llama_cpp import Llama

    kind = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32}[job["keys"]]
    model = Llama(
        job["model"], n_ctx=512, n_threads=job["threads"], n_threads_batch=job["threads"], type_k=kind, type_v=kind,
        verbose=False,
    )  # fmt: skip
    tokens, logits = [], []
    for at, prompt in enumerate(job["prompts"]):
        model.reset()
        given, row, seen = list(prompt), [], []
        for step in range(job["new_tokens"]):
            model.eval(given)
            seen.append(np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(model.n_vocab(),)).copy())
            row.append(int(seen[-1].argmax()))
            given = [job["feed"][at][step] if job["feed"] else row[-1]]
        tokens.append(row)
        logits.append(seen)
    np.savez(job["out"], tokens=np.array(tokens), logits=np.array(logits, dtype=np.float32))


# --------------------------------------------------------------------------------------------------- and in foreroute's
def run_ours(path: Path, math: str, prompts: Sequence[Sequence[int]], new: int, feed: Any, threads: int) -> Said:
    """The same with foreroute, half of the experts in memory."""
    import foreroute

    # isort: split
    import torch

    from foreroute.engine.interfaces import StepInfo
    from foreroute.model.caches import cache_argument, cache_of

    torch.set_num_threads(threads)
    config = foreroute.EngineConfig(math=math)
    model = foreroute.load(path, "50%", "float32", config=config)
    tokens, logits = [], []
    with torch.inference_mode():
        for at, prompt in enumerate(prompts):
            given, cache, row, seen = torch.tensor([list(prompt)]), None, [], []
            for step in range(new):
                with model.foreroute.step(StepInfo.of("decode" if step else "prefill", given, is_start=not step)):
                    out = model(input_ids=given, **cache_argument(cache), use_cache=True, logits_to_keep=1)
                cache = cache_of(out)
                seen.append(out.logits[0, -1].float().numpy().copy())
                row.append(int(seen[-1].argmax()))
                given = torch.tensor([[int(feed[at][step]) if feed is not None else row[-1]]])
            tokens.append(row)
            logits.append(seen)
    model.foreroute.close()
    return Said(np.array(tokens), np.array(logits))


def bits_per_char(path: Path, math: str, threads: int) -> float:
    """Of windows of this repository's documents, each computed as one prompt."""
    import foreroute

    # isort: split
    import torch

    from foreroute.model.text import load_tokenizer

    torch.set_num_threads(threads)
    model = foreroute.load(path, "50%", "float32", config=foreroute.EngineConfig(math=math))
    tokenizer = load_tokenizer(MODEL)
    text = "\n".join((REPOSITORY / name).read_text(encoding="utf-8") for name in TEXTS)
    ids = tokenizer(text)["input_ids"][: WINDOWS * WINDOW_TOKENS]
    nats, chars = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids), WINDOW_TOKENS):
            window = torch.tensor([ids[start : start + WINDOW_TOKENS]])
            rows = torch.log_softmax(model(input_ids=window).logits[0, :-1].double(), -1)
            nats -= float(rows.gather(1, window[0, 1:, None]).sum())
            chars += len(tokenizer.decode(window[0, 1:]))
    model.foreroute.close()
    return nats / chars / float(np.log(2))


def prompts_of(number: int) -> list[list[int]]:
    """Prompts of the evaluation's tasks, all kinds alike."""
    from foreroute.evals.tasks import held_out_suite, kinds
    from foreroute.model.text import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    names = [name for name in kinds() if name != "define"]
    suite = held_out_suite(-(-number // len(names)), seed=0, only=names)
    return [tokenizer(item.prompt)["input_ids"] for item in suite][:number]


# ------------------------------------------------------------------------------------------------------- comparing them
def kl(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Nats by which softmax(ours) diverges from softmax(theirs), [prompts, new]."""
    left, right = (logits - logits.max(-1, keepdims=True) for logits in (ours.astype(float), theirs.astype(float)))
    left, right = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)) for logits in (left, right))
    return np.maximum((np.exp(right) * (right - left)).sum(-1), 0)


def gap(logits: np.ndarray) -> float:
    """Between the two likeliest."""
    best = np.partition(logits, -2)[-2:]
    return float(best.max() - best.min())


def same_greedy(ours: Said, theirs: Said, tie: float) -> dict[str, Any]:
    """Prompts with the same tokens, and the first difference of the others."""
    differences = []
    for at, (left, right) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        places = np.flatnonzero(left != right)
        if len(places):
            first = int(places[0])
            gaps = [gap(ours.logits[at, first]), gap(theirs.logits[at, first])]
            differences.append(
                {"prompt": at, "token": first, "ours": int(left[first]), "theirs": int(right[first]),
                 "gaps": [round(one, 4) for one in gaps], "is_tie": min(gaps) < tie}
            )  # fmt: skip
    num = len(ours.tokens)
    apart = sum(not one["is_tie"] for one in differences)
    return {"same": num - len(differences), "prompts": num, "not_ties": apart, "differences": differences}


def near(ours: Said, theirs: Said) -> dict[str, float]:
    """Both fed the same tokens."""
    divergence = kl(ours.logits, theirs.logits)
    error = np.linalg.norm(ours.logits - theirs.logits, axis=-1) / np.linalg.norm(theirs.logits, axis=-1)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "kl_max": float(divergence.max()),
        "same_top": float((ours.tokens == theirs.tokens).mean()),
        "logits_error": float(np.median(error)),
    }


def compare(kind: str, path: Path, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All engines on one file."""
    prompts = prompts_of(args.prompts)
    ours = run_ours(path, "ggml", prompts, args.tokens, None, args.threads)
    feed = ours.tokens.tolist()
    torch_math = run_ours(path, "torch", prompts, args.tokens, feed, args.threads)
    told: dict[str, Any] = {"torch": near(ours, torch_math)}
    told["bits_per_char"] = {math: bits_per_char(path, math, args.threads) for math in ("ggml", "torch")}
    for name, keys in LLAMA.items() if args.peers_python else ():
        said = {}
        for which, fed in (("greedy", []), ("fed", feed)):
            out = scratch / "said.npz"
            job = {"model": str(path), "prompts": prompts, "new_tokens": args.tokens, "feed": fed, "keys": keys,
                   "threads": args.threads, "out": str(out)}  # fmt: skip
            subprocess.run([args.peers_python, __file__, "--job"], input=json.dumps(job), text=True, check=True)
            with np.load(out) as made:
                said[which] = Said(made["tokens"], made["logits"])
        told[name] = {"greedy": same_greedy(ours, said["greedy"], args.tie), **near(ours, said["fed"])}
        told[f"{name} from torch"] = near(said["fed"], torch_math)
    for name, figures in told.items():
        print(f"{kind} {name}: {json.dumps(figures)}", flush=True)
    return told


def main() -> None:
    """Run the comparison."""
    from benchmarks import to_gguf
    from benchmarks._harness import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="an interpreter with llama-cpp-python; without it, our two maths alone")
    parser.add_argument("--types", nargs="+", choices=sorted(to_gguf.DENSE), default=["q8_0", "q4_0"])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tie", type=float, default=0.05, help="gap of the two likeliest logits that counts as a tie")
    parser.add_argument("--keep", action="store_true", help="for the record")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.types:
            path = Path(folder, f"foreroute-tiny-{kind}.gguf")
            to_gguf.convert(MODEL, path, kind, kind)
            result[kind] = compare(kind, path, args, Path(folder))
    asked = {"prompts": args.prompts, "new_tokens": args.tokens, "tie": args.tie}
    record("beside-llama-cpp", {"asked": asked, "types": result}, keep=args.keep)


if __name__ == "__main__":
    if sys.argv[1:] == ["--job"]:
        run_llama(json.load(sys.stdin))
    else:
        main()
