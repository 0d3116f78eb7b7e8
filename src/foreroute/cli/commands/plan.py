"""`foreroute plan`: what fits into which memory, how fast it may run, and what would improve that."""

import argparse
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import figures, options, requests
from foreroute.cli.forecast import ASSUMPTIONS, Forecast, forecast
from foreroute.config import EngineConfig, Plan
from foreroute.memory.serving_budget import ServingNeeds
from foreroute.units import format_memory, format_speed

if TYPE_CHECKING:
    from foreroute.bench.bandwidth import Bandwidth
    from foreroute.cli.probes import ComputeTime, ReadCost

_EPILOG = """\
examples:
  foreroute plan MODEL                    the memory is chosen from the free RAM
  foreroute plan MODEL --memory 8GiB
  foreroute plan MODEL --memory 25% --json
  foreroute plan MODEL --max-num-seqs 8 --ctx-size 8192    what serve takes

the figures:
  slots        regions of memory that hold one expert each
  one token    the experts that one token uses, over all layers. If the memory
               holds those of few tokens, there are few hits
  in all       with --max-num-seqs, --ctx-size or --kv-tokens: the most that
               serve takes of the RAM. Working memory is this process, as
               measured, and what a chunk of a prompt may take
  prefetches   the most slots that prefetched experts take before they are used
  disk         measured for one second on this model's own experts, in random
               order, read as the engine reads them
  compute      measured: one token with its experts in memory, for two seconds
               at most; where a token takes longer, from some of its layers
  long prompt  prefill uses nearly every expert: time to read them all once
  TPOT         time per output token: forecast, not measured, from disk, compute
               and the miss rates of another model. The range is from reads that
               overlap compute fully to reads that do not overlap it
The model is loaded without its experts, and no text is generated."""

# A pool that holds fewer tokens' demand than this is called small.
_SMALL_POOL_DEMANDS = 2.0


@dataclass(frozen=True)
class Findings:
    """Everything that is shown. chosen_memory_bytes: the budget chosen when --memory is left out.

    serving: RAM that serve needs, where requests are planned for; context: tokens that each request may have.
    """

    plan: Plan
    eviction: str
    reading: "ReadCost"
    kv_bytes_per_token: int
    chosen_memory_bytes: int
    bandwidth: "Bandwidth"
    compute: "ComputeTime"
    cases: tuple[Forecast, ...]
    serving: ServingNeeds | None = None
    context: int | None = None


def add_parser(commands: Any) -> None:
    """Add `plan` to the commands."""
    parser = commands.add_parser(
        "plan",
        help="show what fits, a forecast of the speed, and what to change",
        usage="foreroute plan MODEL [flags]",
        description="Show what fits, measure disk and CPU, forecast the time per token.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    options.add_common_options(parser)
    options.add_model_options(parser)
    requests.add_request_options(parser.add_argument_group("requests"), max_num_seqs=None)
    options.add_engine_options(parser, without=("trace",), shown=("kv_tokens",))


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    config, folder = options.engine_config(args), options.find_model(args)
    options.quiet_libraries(args)
    with figures.busy("Loading the model and measuring", args.json):
        found = find(folder, args, config)
    hints = advice(found, args.model)
    if args.json:
        figures.print_json(**as_json(found), advice=hints, assumptions=ASSUMPTIONS)
    else:
        show(found, hints)
    return 0


def find(folder: Path, args: argparse.Namespace, config: EngineConfig) -> Findings:
    """Load the model in `folder` with `config` but without its experts, and measure what the flags `args` ask for."""
    import foreroute
    from foreroute.bench.bandwidth import measure_bandwidth
    from foreroute.cli import probes
    from foreroute.loading.arguments import open_device
    from foreroute.loading.block_kernels import dense_nbytes_at_load
    from foreroute.loading.checkpoint import open_checkpoint
    from foreroute.memory.host import available_ram
    from foreroute.memory.plan import choose_memory
    from foreroute.memory.serving import planned_kv_bytes_per_token

    options.apply_threads(args)
    config, context = _with_room(folder, args, config)
    # Measured before the dense weights are in RAM, as `load` does.
    free_ram = available_ram()
    checkpoint = open_checkpoint(folder, None, config.packed)
    store = checkpoint.store
    model = foreroute.load(folder, dtype=args.dtype, config=config)
    with closing(model.foreroute):
        plan, table = model.foreroute.plan, model.foreroute.table
        compute, kv_bytes = (
            probes.measure_compute(model),
            planned_kv_bytes_per_token(model, plan, model.foreroute.layers),
        )
        # Last: what it measures grows with what has been computed.
        serving = None if context is None else requests.needs_of(model, context)
    if plan.device != "cpu":
        from foreroute.bench.link import measure_link

        bandwidth = measure_link(plan.slot_bytes)
        reading = probes.ReadCost(1, plan.slot_bytes, plan.slot_bytes)
        found = _found(plan, config, kv_bytes, plan.memory_bytes, bandwidth, compute, reading)
        return replace(found, context=context)
    beside = 0 if serving is None else serving.tokens_bytes
    dense_bytes = dense_nbytes_at_load(config, checkpoint, open_device(config))
    chosen = choose_memory(None, checkpoint.kept, dense_bytes + plan.draft_bytes, beside, free_ram)
    reads_of = table.reads if store is None else store.reads_of(table)
    keys = table.keys.all()
    bandwidth = measure_bandwidth(
        reads_of,
        keys,
        table.slot_bytes,
        num_threads=config.readers(table.slot_bytes),
        direct=config.direct_io,
        label=table.label,
    )
    found = _found(plan, config, kv_bytes, chosen, bandwidth, compute, probes.read_cost(table, reads_of))
    return replace(found, serving=serving, context=context)


def _with_room(folder: Path, args: argparse.Namespace, config: EngineConfig) -> tuple[EngineConfig, int | None]:
    """Reserve room for requests as serve does; return the context of one too, None where no flag mentions requests."""
    if args.max_num_seqs is None and args.ctx_size is None and config.kv_tokens is None:
        return config, None
    return requests.with_room(folder, config, args)


def _found(
    plan: Plan,
    config: EngineConfig,
    kv_bytes: int,
    chosen_memory_bytes: int,
    bandwidth: "Bandwidth",
    compute: "ComputeTime",
    reading: "ReadCost",
) -> Findings:
    cases = forecast(
        plan.resident_share if config.cache else 0.0,
        plan.token_demand_slots,
        plan.expert_bytes,
        bandwidth.bytes_per_s,
        compute.ms,
        "lru" if config.control == "device" else config.eviction,
    )
    return Findings(plan, config.eviction, reading, kv_bytes, chosen_memory_bytes, bandwidth, compute, cases)


def advice(found: Findings, model: str) -> list[str]:
    """Suggest what would improve the forecast in `found` for `model`, most useful first; empty when nothing would."""
    plan, hints = found.plan, list[str]()
    if plan.device != "cpu":
        return _gpu_advice(plan)
    whole, demand = plan.all_slot_bytes, plan.token_slot_bytes
    chosen = format_memory(found.chosen_memory_bytes)
    # What is beyond all experts is never allocated.
    if min(plan.memory_bytes, whole) > found.chosen_memory_bytes and not plan.memory_was_chosen:
        hints.append(
            f"This memory, the dense weights and 2 GiB for the rest exceed the free RAM: the system may swap. "
            f"--memory {_flag(found.chosen_memory_bytes)} fits, as does leaving it out."
            if found.chosen_memory_bytes >= demand
            else f"There is too little free RAM beside the dense weights (room for {chosen}): close other programs."
        )
    if plan.num_slots < _SMALL_POOL_DEMANDS * plan.token_demand_slots:
        hints.append(
            f"The memory holds only {plan.num_slots / plan.token_demand_slots:.1f} tokens' demand: expect few hits. "
            f"--memory {_flag(2 * demand)} holds two."
        )
    if plan.num_slots < plan.total_slots:
        fits = whole <= found.chosen_memory_bytes
        hints.append(
            f"--memory {_flag(whole)} would hold every expert"
            + (": nothing is read twice." if fits else f"; the free RAM has room for {chosen}.")
        )
    if plan.source != "packed" and plan.num_slots < plan.total_slots:
        hints.append(_what_packing_gains(found.reading, model, plan.total_slots * plan.slot_bytes))
    if not found.bandwidth.is_direct:
        hints.append(
            "Experts are read through the page cache, not with O_DIRECT: the disk's figure above may be that of RAM. "
            "A file system that allows O_DIRECT (ext4, xfs) keeps the RAM for the experts."
        )
    if plan.math_note:
        hints.append(plan.math_note)
    if plan.math == "family":
        hints.append(
            "In this dtype the family's own experts code runs, one expert at a time, and nothing is prefetched. "
            "Another --dtype may be faster."
        )
    if plan.threads > plan.usable_cpus:
        hints.append(
            f"torch has {plan.threads} threads, and this process may use {plan.usable_cpus} processors: threads block "
            f"each other. Use --threads {plan.usable_cpus} (in Python: torch.set_num_threads)."
        )
    return hints


def _what_packing_gains(reading: "ReadCost", model: str, store_bytes: int) -> str:
    now = "one read and a copy" if reading.reads == 1 else f"{reading.reads} reads and copies"
    pages = ""
    if reading.packed_nbytes < reading.nbytes:
        before, after = format_memory(reading.nbytes), format_memory(reading.packed_nbytes)
        pages = f", and {after} in whole pages in place of {before}"
    return (
        f"foreroute pack {model}: an expert becomes one aligned read without a copy (now {now}){pages}. "
        f"It takes {format_memory(store_bytes, round_up=True)} of disk."
    )


def _gpu_advice(plan: Plan) -> list[str]:
    hints = []
    if plan.host_records < plan.total_slots:
        hints.append(
            f"Host memory holds {plan.host_records} of {plan.total_slots} experts, the others stay on disk: "
            f"--host-memory {_flag(plan.total_slots * plan.slot_bytes)} would hold all of them."
        )
    if plan.num_slots < _SMALL_POOL_DEMANDS * plan.token_demand_slots:
        hints.append("The GPU holds less than two tokens' demand: a lower --kv-tokens or --prefill-chunk makes room.")
    return hints


def _flag(num_bytes: int) -> str:
    """Format bytes as a value of --memory that needs no quotes and is not rounded down."""
    return format_memory(num_bytes, round_up=True).replace(" ", "")


def as_json(found: Findings) -> dict[str, Any]:
    """Build the object that `--json` prints, with units in the names."""
    plan = found.plan
    return {
        "plan": {
            **asdict(plan),
            "resident_share": plan.resident_share,
            "token_demand_bytes": plan.token_demand_bytes,
            "reads_per_expert": found.reading.reads,
            "read_bytes_per_expert": found.reading.nbytes,
            "packed_bytes_per_expert": found.reading.packed_nbytes,
            "kv_bytes_per_1k_tokens": found.kv_bytes_per_token * 1000,
            "chosen_memory_bytes": found.chosen_memory_bytes,
        },
        "serving": None if found.serving is None else {"context": found.context, **requests.as_json(found.serving)},
        "measured": {
            "disk": asdict(found.bandwidth),
            "compute_ms": found.compute.ms,
            "compute_passes": found.compute.num_passes,
            "compute_layers": found.compute.num_layers,
        },
        "forecast": {case.name: asdict(case) for case in found.cases},
    }


def show(found: Findings, hints: list[str]) -> None:
    """Print what was `found`, and the hints, on standard output: they are the answer."""
    console = figures.stdout_console()
    figures.print_rows(console, [*_model_rows(found), None, *_memory_rows(found), None, *_speed_rows(found)])
    console.print()
    figures.print_grid(console, ("forecast", "TPOT", "misses per token", "read per token"), _forecast_rows(found))
    console.print("\nIt assumes:", style="dim")
    figures.print_list(console, ASSUMPTIONS, style="dim")
    console.print("\nWhat would change it:" if hints else "\nNothing is left to change: every expert is in memory.")
    figures.print_list(console, hints)


def _model_rows(found: Findings) -> list[figures.Row]:
    plan = found.plan
    top_k = "/".join(str(k) for k in sorted(set(plan.top_k)))
    is_converted = plan.math != "ggml" and figures.dtype_name(plan.stored_dtype) != plan.compute_dtype
    cache = format_memory(found.kv_bytes_per_token * 1000) if found.kv_bytes_per_token else "none"
    return [
        ("model", plan.model_type, f"{plan.num_layers} MoE layers x {plan.num_experts} experts, top-{top_k}"),
        ("one expert", format_memory(plan.expert_bytes),
         f"{_sizes(plan)}{plan.stored_dtype}, computed in {plan.compute_dtype}"
         + (" (converted at every use)" if is_converted else "")),
        ("all experts", format_memory(plan.total_expert_bytes), f"on disk, {_source(plan)}"),
        ("dense weights", format_memory(plan.dense_bytes),
         ("" if plan.dense == "stored" else f"{plan.dense}, ")
         + f"always {'in RAM' if plan.device == 'cpu' else 'on the GPU'}, beside --memory"),
        *_draft_row(plan),
        ("KV cache", cache, "per 1,000 tokens, beside --memory"),
    ]  # fmt: skip


def _draft_row(plan: Plan) -> list[figures.Row]:
    """What drafts tokens, if anything."""
    if not plan.draft:
        return []
    if not plan.draft_bytes:
        return [("draft", plan.draft, "found in the text itself")]
    cache = format_memory(plan.draft_bytes_per_token * 1000)
    return [("draft", format_memory(plan.draft_bytes), f"in RAM, beside --memory, and {cache} per 1,000 tokens")]


def _sizes(plan: Plan) -> str:
    """Say that layers' experts differ in size, where they do."""
    return "on average; " if len(plan.slot_classes) > 1 else ""


def _memory_rows(found: Findings) -> list[figures.Row]:
    plan = found.plan
    demands = plan.num_slots / plan.token_demand_slots
    free = "free RAM" if plan.device == "cpu" else "GPU's free memory"
    chosen = f", chosen from the {free}" if plan.memory_was_chosen else ""
    return [
        ("--memory", format_memory(plan.memory_bytes),
         f"{plan.num_slots} slots, {figures.percent(plan.resident_share)} of the experts{chosen}"),
        ("one token", format_memory(plan.token_demand_bytes),
         f"{plan.token_demand_slots} experts: the memory holds {demands:.1f} tokens' demand"),
        ("prefetches", f"{plan.staging_slots} slots", f"at most; predictor: {plan.predictor}"),
        *_serving_rows(found),
    ]  # fmt: skip


def _serving_rows(found: Findings) -> list[figures.Row]:
    """Rows on the memory that requests take, where they are planned for."""
    if found.context is None:
        return []
    needs, plan = found.serving, found.plan
    kv_bytes = format_memory(plan.kv_tokens * found.kv_bytes_per_token if needs is None else needs.kv_bytes)
    kv_tokens = plan.kv_tokens if needs is None else needs.kv_tokens
    cache = ("requests", kv_bytes, f"of KV cache: {kv_tokens:,} tokens, of one {found.context:,}")
    if needs is None:
        return [cache]
    return [
        cache,
        ("", format_memory(needs.kept_bytes), "of earlier prompts, kept for those that begin alike"),
        ("working", format_memory(needs.all_working_bytes), "memory: Python, torch, one chunk of a prompt"),
        ("in all", format_memory(needs.total_bytes, round_up=True), "of RAM: experts, dense weights and these three"),
    ]  # fmt: skip


def _speed_rows(found: Findings) -> list[figures.Row]:
    plan, disk = found.plan, found.bandwidth
    way = "O_DIRECT" if disk.is_direct else "through the page cache"
    name = "disk"
    if plan.device != "cpu":
        name, way = "link", "from pinned host memory"
    absent_bytes = (1 - plan.resident_share) * plan.total_expert_bytes
    return [
        (name, format_speed(disk.bytes_per_s),
         f"measured: {disk.num_experts:,} random experts in {disk.elapsed_s:.1f} s, {way}"),
        ("compute", figures.number(found.compute.ms, "ms"), _how_computed(found)),
        ("long prompt", figures.number(absent_bytes / disk.bytes_per_s, "s"), "of reading: it uses every expert once"),
    ]  # fmt: skip


def _how_computed(found: Findings) -> str:
    """What of a token was computed, and by what."""
    plan, compute = found.plan, found.compute
    what = "measured: one token, its experts in memory"
    if not compute.num_passes:
        what = f"from {compute.num_layers} of {plan.num_layers} layers, measured"
    by = "on the GPU" if plan.device != "cpu" else f"{plan.threads} thread{'s' if plan.threads > 1 else ''}"
    return f"{what}, {by}{', ggml' if plan.math == 'ggml' else ''}"


def _forecast_rows(found: Findings) -> list[tuple[str, ...]]:
    names = {"best": "best: Belady", "likely": f"likely: {found.eviction.upper()}", "worst": "worst: no hits"}
    return [
        (
            names[case.name],
            figures.span(case.tpot_ms_low, case.tpot_ms_high, "ms"),
            f"{figures.number(case.misses_per_token)} ({figures.percent(case.miss_rate)})",
            figures.number(case.read_mb_per_token, "MB"),
        )
        for case in found.cases
    ]


def _source(plan: Plan) -> str:
    rows = ", eight rows side by side" if plan.layout == "interleaved" else ""
    return {"packed": f"packed store{rows}", "gguf": "GGUF file"}.get(plan.source, plan.source)
