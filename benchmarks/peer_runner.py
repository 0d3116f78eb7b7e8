"""Run one engine once, in a process of its own, and print what it took as one JSON line.

    echo '{"engine": "accelerate", "model": "build/synth", ...}' | python -m benchmarks.peer_runner

peers.py starts it, with the interpreter that has the engine installed. It imports no more than that engine needs, so
that one engine's memory is never another's. The job (see `Job`) comes in on standard input.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What to run.

    engine: a key of ENGINES.
    model: the checkpoint's folder; for llama.cpp the GGUF file.
    memory: what the experts may take of memory, in bytes (foreroute, accelerate); None: all of them.
    prompt: token ids.
    feed: the tokens that follow, whatever the engine would have chosen; empty for greedy decoding.
    new_tokens: tokens to make; the first of them ends the TTFT.
    warm_up: token ids of a prompt that is computed before, so that its experts are resident; of engines on a GGUF file.
    scratch: an empty folder on the same disk, for engines that write the weights in a form of their own.
    options: fields of foreroute's EngineConfig, for what each of its parts is worth; accelerate's resident_layers;
        llama.cpp's mmap and repack.
    """

    engine: str
    model: str
    memory: int | None
    prompt: list[int]
    feed: list[int]
    new_tokens: int
    threads: int
    scratch: str
    options: dict[str, Any] = field(default_factory=dict)
    warm_up: list[int] = field(default_factory=list)


@dataclass
class Meter:
    """Snapshots of time and bytes read: of this process, and of the disk that holds the model."""

    model: str
    marks: list[dict[str, float]] = field(default_factory=list)

    def mark(self) -> None:
        """Take a snapshot now."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.marks.append(
            {
                "time_s": time.perf_counter(),
                "read_bytes": process_read_bytes(),
                "disk_bytes": disk_read_bytes(self.model),
                "major_faults": usage.ru_majflt,
                "user_s": usage.ru_utime,
                "system_s": usage.ru_stime,
            }
        )

    def between(self, first: int, last: int) -> dict[str, float]:
        """What was used from one mark to another."""
        return {name: self.marks[last][name] - self.marks[first][name] for name in self.marks[first]}


def process_read_bytes() -> int:
    """Bytes that this process made the disk read, page faults included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["read_bytes"])


def disk_read_bytes(path: str) -> int:
    """Bytes read from the disk that holds `path` since boot, by anyone; 0 where the kernel does not say."""
    device = os.stat(path).st_dev
    counters = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return int(counters.read_text(encoding="utf-8").split()[2]) * 512 if counters.exists() else 0


def memory_bytes(name: str) -> int:
    """A field of /proc/self/status (VmHWM, RssAnon, RssShmem), in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


# ---------------------------------------------------------------------------------------- engines that are transformers
def run_transformers(job: Job, meter: Meter) -> dict[str, Any]:
    """Resident: every weight in memory, transformers' own experts implementation."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    return generate(AutoModelForCausalLM.from_pretrained(job.model, dtype="auto"), job, meter)


def run_transformers_eager(job: Job, meter: Meter) -> dict[str, Any]:
    """Resident, experts_implementation="eager": the reference of foreroute's exactness."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto", experts_implementation="eager")
    return generate(model, job, meter)


def run_accelerate(job: Job, meter: Meter) -> dict[str, Any]:
    """Disk offload: as many layers' experts as the memory holds stay, the others are mapped from the offload folder.

    transformers fuses a layer's experts into two tensors, so a layer is the smallest part that accelerate can offload,
    and loading writes the fused tensors to the offload folder. eager touches only the routed experts of the mapping.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    experts = config.get("num_experts") or config["num_local_experts"]
    layer_bytes = experts * 3 * config["hidden_size"] * config["moe_intermediate_size"] * 2
    num_layers = config["num_hidden_layers"]
    fitting = num_layers if job.memory is None else min(job.memory // layer_bytes, num_layers)
    num_resident = job.options.get("resident_layers", fitting)
    model = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype="auto",
        experts_implementation="eager",
        device_map=offload_map(num_layers, num_resident),
        offload_folder=job.scratch,
    )
    return {"layers_resident": num_resident, **generate(model, job, meter)}


def offload_map(num_layers: int, num_resident: int) -> dict[str, str]:
    """Everything in memory but the experts of the last layers."""
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        for name in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
            places[f"{prefix}.{name}"] = "cpu"
        places[f"{prefix}.mlp.experts"] = "cpu" if layer < num_resident else "disk"
    return places


def run_foreroute(job: Job, meter: Meter) -> dict[str, Any]:
    """foreroute itself: the experts in slots of `memory` bytes, the others on disk; its own counts with the result."""
    import foreroute  # before torch, which then spins less (foreroute/__init__.py)

    # isort: split
    import torch

    torch.set_num_threads(job.threads)
    memory = "100%" if job.memory is None else job.memory
    model = foreroute.load(job.model, memory=memory, config=foreroute.EngineConfig(**job.options))
    told = generate(model, job, meter)
    return {**told, "stats": model.foreroute.stats().as_dict()}


def run_foreroute_gguf(job: Job, meter: Meter) -> dict[str, Any]:
    """foreroute on a GGUF file: its own loop, fed the given tokens."""
    import foreroute  # before torch, which then spins less (foreroute/__init__.py)

    # isort: split
    import torch

    from foreroute.engine.interfaces import StepInfo

    torch.set_num_threads(job.threads)
    memory = "100%" if job.memory is None else job.memory
    model = foreroute.load(job.model, memory=memory, config=foreroute.EngineConfig(**job.options))
    chosen: list[int] = []
    tokens, cache = torch.tensor([job.prompt]), None
    loaded_at = Meter(job.model)
    loaded_at.mark()
    with torch.inference_mode():
        if job.warm_up:
            _load_all(model)
            with model.foreroute.step(StepInfo("prefill", 1, len(job.warm_up), is_start=True)):
                model(input_ids=torch.tensor([job.warm_up]), use_cache=False, logits_to_keep=1)
        meter.mark()
        for step in range(job.new_tokens):
            phase = "decode" if step else "prefill"
            with model.foreroute.step(StepInfo.of(phase, tokens, is_start=not step)):
                output = model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1)
            cache = output.cache
            chosen.append(int(output.logits[0, -1].argmax()))
            meter.mark()
            tokens = torch.tensor([[job.feed[step] if job.feed else chosen[-1]]])
    load_s = loaded_at.marks[0]["time_s"] - meter.marks[0]["time_s"]
    return {"tokens": chosen, "load_s": load_s, "stats": model.foreroute.stats().as_dict()}


def _load_all(model: Any) -> None:
    """Have every expert in memory, as far as there is room: routers of random weights leave some out for long."""
    pool = model.foreroute.engine.pool
    for layer, width in enumerate(pool.keys.widths):
        for expert in range(width):
            _, waiting = pool.demand(layer, [pool.keys.key(layer, expert)])
            while waiting:
                pool.wait(waiting)
            pool.release([pool.keys.key(layer, expert)])


def generate(model: Any, job: Job, meter: Meter) -> dict[str, Any]:
    """Decode with transformers' generate(); the clock is a streamer, the given tokens come by a logits processor."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList
    from transformers.generation.streamers import BaseStreamer

    chosen: list[int] = []

    class Feed(LogitsProcessor):  # type: ignore[misc]
        """Records what the model would say, then puts the given token first."""

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            chosen.append(int(scores.argmax()))
            if job.feed:
                scores = torch.full_like(scores, -torch.inf)
                scores[:, job.feed[len(chosen) - 1]] = 0
            return scores

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Takes a snapshot at every token; generate() hands it the prompt first."""

        def put(self, value: Any) -> None:
            meter.mark()

        def end(self) -> None:
            pass

    os.sync()  # what loading wrote must not be written while tokens are timed
    meter.mark()
    prompt = torch.tensor([job.prompt])
    model.generation_config.eos_token_id = None
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=job.new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([Feed()]),
        streamer=Clock(),
    )
    del meter.marks[2]  # the prompt's own, at the start of generate()
    return {"tokens": chosen}


# ---------------------------------------------------------------------------------------------------------- llama.cpp
def run_llama_cpp(job: Job, meter: Meter) -> dict[str, Any]:
    """llama.cpp with its weights mapped from the file, which is its default.

    Its other default, to rewrite what it can for this CPU, is off unless option repack says so: rewritten weights are a
    copy in memory of its own, which a model larger than the memory does not have.
    """
    import llama_cpp
    import numpy as np
    from llama_cpp import Llama, llama_print_system_info

    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def with_repack_said() -> Any:
        params = defaults()
        params.use_extra_bufts = bool(job.options.get("repack", False))
        return params

    llama_cpp.llama_cpp.llama_model_default_params = with_repack_said  # Llama() has no argument for it
    model = Llama(
        job.model,
        n_ctx=max(1024, len(job.prompt) + job.new_tokens + 64),
        n_threads=job.threads,
        n_threads_batch=job.threads,
        use_mmap=job.options.get("mmap", True),
        verbose=False,
    )
    os.sync()
    load_s = time.perf_counter() - meter.marks[0]["time_s"]
    if job.warm_up:
        model.eval(job.warm_up)
        model.reset()
    meter.mark()
    chosen: list[int] = []
    tokens = job.prompt
    for step in range(job.new_tokens):
        model.eval(tokens)
        logits = np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(model.n_vocab(),))
        chosen.append(int(logits.argmax()))
        meter.mark()
        tokens = [job.feed[step] if job.feed else chosen[-1]]
    return {"tokens": chosen, "load_s": load_s, "system_info": llama_print_system_info().decode()}


ENGINES: dict[str, Callable[[Job, Meter], dict[str, Any]]] = {
    "foreroute": run_foreroute,
    "foreroute-gguf": run_foreroute_gguf,
    "accelerate": run_accelerate,
    "transformers": run_transformers,
    "transformers-eager": run_transformers_eager,
    "llama.cpp": run_llama_cpp,
}


def run(job: Job) -> dict[str, Any]:
    """Run one job; marks are 0 start, 1 loaded, 2 first token, 3.. the other tokens."""
    meter = Meter(job.model)
    meter.mark()
    told = ENGINES[job.engine](job, meter)
    decode = meter.between(2, -1)
    steps = len(meter.marks) - 3
    token_s = [meter.between(i, i + 1)["time_s"] for i in range(2, len(meter.marks) - 1)]
    return {
        "load_s": meter.between(0, 1)["time_s"],
        "load_read_bytes": meter.between(0, 1)["read_bytes"],
        "ttft_s": meter.between(1, 2)["time_s"],
        "prefill_read_bytes": meter.between(1, 2)["read_bytes"],
        "tpot_s": decode["time_s"] / steps,
        "token_s": token_s,
        "read_bytes_per_token": decode["read_bytes"] / steps,
        "disk_bytes_per_token": decode["disk_bytes"] / steps,
        "major_faults_per_token": decode["major_faults"] / steps,
        "cpu_s_per_token": (decode["user_s"] + decode["system_s"]) / steps,
        "system_s_per_token": decode["system_s"] / steps,
        "peak_rss_bytes": memory_bytes("VmHWM"),
        "own_bytes": memory_bytes("RssAnon") + memory_bytes("RssShmem"),  # what is no file's and cannot be dropped
        **told,
    }


if __name__ == "__main__":
    print(json.dumps(run(Job(**json.load(sys.stdin)))))
