"""`foreroute show`: what a model is, from its headers alone: family, layers, experts, sizes, context, chat template."""

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.hub.fetch import HubAccess
from foreroute.checkpoint.locate import locate
from foreroute.cli import figures, options
from foreroute.errors import CheckpointError
from foreroute.units import format_memory

if TYPE_CHECKING:
    from foreroute.loading.checkpoint import Checkpoint

_EPILOG = """\
examples:
  foreroute show foreroute-tiny
  foreroute show MODEL --json

Only headers are read: no weight is loaded, nothing is downloaded and nothing
is measured. `foreroute plan MODEL` loads the model and forecasts the speed."""

# What families call the experts that a token uses.
_TOP_K = ("num_experts_per_tok", "num_selected_experts", "moe_topk", "top_k_experts", "moe_k")


def add_parser(commands: Any) -> None:
    """Add `show` to the commands."""
    parser = commands.add_parser(
        "show",
        help="show what a model is: family, experts, sizes, context",
        usage="foreroute show MODEL [flags]",
        description="Show what a model is, from its headers.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    options.add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    folder = _on_this_machine(args)
    options.quiet_libraries(args)
    with figures.busy("Reading the headers", args.json):
        from foreroute.loading.checkpoint import open_checkpoint

        found = facts(open_checkpoint(folder, None, "auto"))
    if args.json:
        figures.print_json(model=args.model, **found)
    else:
        console = figures.stdout_console()
        # A path may be longer than a line, and is no cell of the table: it would take the other columns' room.
        console.print(
            found["path"] if args.model == found["path"] else f"{args.model}: {found['path']}", soft_wrap=True
        )
        figures.print_rows(console, _rows(found))
    return 0


def _on_this_machine(args: argparse.Namespace) -> Path:
    """The model's path; a hub id is looked for in the cache alone."""
    try:
        model = options.alias_target(args, args.model)
        return locate(model, revision=args.revision, quiet=True, access=HubAccess(local_files_only=True))
    except CheckpointError as error:
        if "the cache does not have it" not in str(error):
            raise
        raise CheckpointError(
            f"{args.model} is not on this machine. Download it with `foreroute pull {args.model}`, or see what is here "
            "with `foreroute list`."
        ) from error


def facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What headers and config say of a model, with units in the names; None where they do not say it."""
    sketch, kept = checkpoint.outline, checkpoint.kept
    text = sketch.config.get_text_config()
    return {
        "path": str(checkpoint.folder),
        "family": sketch.config.model_type,
        "format": checkpoint.index.kind,
        "stored_as": checkpoint.stored_dtype,
        "moe_layers": len(kept.layers),
        "experts": kept.total_slots,
        "experts_per_layer": sorted({layer.num_experts for layer in kept.layers}),
        "experts_per_token_and_layer": next((k for name in _TOP_K if (k := getattr(text, name, None))), None),
        "expert_bytes": kept.expert_nbytes,
        "dense_bytes": sketch.dense_nbytes,
        "checkpoint_bytes": checkpoint.index.nbytes,
        "matrix_types": _matrix_types(checkpoint),
        "context_tokens": getattr(text, "max_position_embeddings", None),
        "vocabulary": getattr(text, "vocab_size", None),
        "chat_template": _has_template(checkpoint.folder),
        "packed_store": None if checkpoint.store is None else str(checkpoint.store.path),
        "notes": list(sketch.notes),
    }


def _matrix_types(checkpoint: "Checkpoint") -> dict[str, int]:
    """How many layers' expert matrices are stored in which type."""
    kinds = Counter(
        matrix.coding.kind.removeprefix("gguf:") or "plain"
        for layer in checkpoint.kept.layers
        for part in layer.parts
        for matrix in part.matrices
    )
    return dict(kinds)


def _has_template(folder: Path) -> bool | None:
    """Whether its tokenizer has a chat template; None where it has no tokenizer."""
    from foreroute.model.text import load_tokenizer

    try:
        return bool(getattr(load_tokenizer(folder), "chat_template", None))
    except CheckpointError:
        return None


def _rows(found: dict[str, Any]) -> list[figures.Row]:
    widths = "/".join(map(str, found["experts_per_layer"]))
    top_k = "" if found["experts_per_token_and_layer"] is None else f", top-{found['experts_per_token_and_layer']}"
    types = ", ".join(f"{kind}: {count}" for kind, count in found["matrix_types"].items())
    template = {True: "yes", False: "no", None: "no tokenizer"}[found["chat_template"]]
    said = {True: "", False: "it continues text; it may not answer", None: "text cannot be generated"}
    context = found["context_tokens"]
    rows: list[figures.Row] = [
        ("family", found["family"], f"{found['moe_layers']} MoE layers x {widths} experts{top_k}"),
        ("format", found["format"], f"experts stored as {found['stored_as']}"),
        ("all experts", format_memory(found["expert_bytes"]), f"{found['experts']:,} experts, on disk"),
        ("dense weights", format_memory(found["dense_bytes"]), "always in memory"),
        ("files", format_memory(found["checkpoint_bytes"]), "of tensors in all"),
        ("context", "not said" if context is None else f"{context:,} tokens", f"vocabulary {found['vocabulary']:,}"),
        ("chat template", template, said[found["chat_template"]]),
    ]
    if len(found["matrix_types"]) > 1:
        rows.insert(2, ("", "", f"matrices by type: {types}"))
    if found["packed_store"]:
        rows.append(("packed store", "yes", found["packed_store"]))
    return [*rows, *(("note", "", note) for note in found["notes"])]
