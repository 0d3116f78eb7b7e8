"""`foreroute serve`: a model behind OpenAI's and Anthropic's APIs, for existing clients."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.locate import locate
from foreroute.cli import figures, options, requests
from foreroute.errors import ForerouteError
from foreroute.units import format_memory

if TYPE_CHECKING:
    from foreroute.config import EngineConfig
    from foreroute.server.backend import Backend
    from foreroute.server.dialogue.parsing.formats import Format
    from foreroute.server.settings import Limits, ServerSettings
    from foreroute.types import Progress

# The only environment variable that the server reads.
KEY_VARIABLE = "FOREROUTE_API_KEY"
# Of what is reported of reading: the dense weights, whether host memory is filled after them or not.
_DENSE_SHARE = 0.6

_EPILOG = """\
examples:
  foreroute serve MODEL --memory 8GiB
  foreroute serve -m MODEL --port 9000 --served-model-name me
  FOREROUTE_API_KEY=... foreroute serve MODEL --host 0.0.0.0

  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

It listens at once; GET /health says when the model is ready. Then:
  /v1/chat/completions  /v1/responses  /v1/completions  /v1/models  OpenAI's
  /v1/messages  /v1/messages/count_tokens                           Anthropic's
  /tokenize  /detokenize  /tokenizer_info                           lm-eval's
  /metrics (Prometheus)  /version  /openapi.json  / (the page)
A parameter that would change an answer and is not supported is refused by name.
Ctrl-C ends running answers and stops.

Other machines can reach it only with --host, which needs a key or --insecure. A
key in FOREROUTE_API_KEY does not show in the list of processes. There is no
TLS: put a proxy in front."""


def add_parser(commands: Any) -> None:
    """Add `serve` to the commands."""
    parser = commands.add_parser(
        "serve",
        help="serve OpenAI's and Anthropic's APIs, and a page of what it does",
        usage="foreroute serve MODEL [flags]",
        description="Serve a model over OpenAI's API (chat, responses) and Anthropic's (messages).",
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=options.MODEL_HELP)
    parser.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    options.add_common_options(parser)
    _add_server_options(parser)
    options.add_model_options(parser)
    options.add_engine_options(parser, shown=("kv_tokens", "policy"))


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)")
    group.add_argument("--port", type=_port, default=8000, metavar="N", help="0: any free one (default: 8000)")
    group.add_argument(
        "--api-key", action="append", metavar="KEY", help=f"requests must bring it (default: ${KEY_VARIABLE})"
    )
    group.add_argument("--insecure", action="store_true", help="accept other machines without a key")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names that requests may use (default: the folder's)"
    )
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME[:PORT]",
        help="name under which a proxy is reached, with its port unless that is 80 or 443 (repeat for others)",
    )  # fmt: skip
    group.add_argument("--no-ui", action="store_true", help="no page at /")
    group = parser.add_argument_group("requests")
    requests.add_request_options(group)
    group.add_argument(
        "--max-waiting", type=options.at_least(0), default=64, metavar="N",
        help="requests that may wait their turn; further ones get 429 (default: 64)",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=options.between(0, 2), metavar="X", help="for requests without one (default: the model's)"
    )
    group.add_argument(
        "--seed", type=options.at_least(0), metavar="N", help="for requests without one (default: random)"
    )
    group.add_argument(
        "--tool-parser", metavar="NAME", help="format of the model's tool calls (default: its chat template says)"
    )


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not within 0 and 65535")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the command until it is stopped; return its exit code."""
    began = time.perf_counter()
    model, config = _model(args), options.engine_config(args)
    folder = locate(options.alias_target(args, model))
    options.quiet_libraries(args)
    try:
        from foreroute.server.dialogue.parsing.formats import format_named
        from foreroute.server.run import address_of, listen_all, serve
        from foreroute.server.settings import ServerSettings, check_exposure, host_name
        from foreroute.server.watching.pages import add_page
    except ImportError as error:
        raise ForerouteError(f"{error}. Install the server: pip install 'foreroute[serve]'") from error
    from foreroute.server.backend import Backend

    # Checked before anything is loaded.
    calls = None if args.tool_parser is None else format_named(args.tool_parser)
    keys = tuple(args.api_key or filter(None, [os.environ.get(KEY_VARIABLE)]))
    check_exposure(args.host, keys, is_insecure=args.insecure)
    settings = ServerSettings(
        served_names=_names(args, folder, model),
        host=args.host,
        port=args.port,
        api_keys=keys,
        allowed_hosts=frozenset(map(host_name, args.allowed_host)),
        temperature=args.temperature,
        seed=args.seed,
        allow_pages=not args.no_ui,
        limits=_limits(args),
    )
    listening = listen_all(args.host, args.port)
    url = address_of(listening[0])
    if not args.json:
        print(f"foreroute serve  {model}\n  address   {url}/v1 (loading; GET /health)", file=sys.stderr, flush=True)

    def load(backend: Backend) -> None:
        lines, memory = _load(backend, folder, args, config, settings, calls)
        ready_s = time.perf_counter() - began
        if args.json:
            names = settings.served_names
            figures.print_json(url=url, ready_s=ready_s, served=names, decided=lines, memory=memory)
            return
        for name, value in lines.items():
            print(f"  {name:<9} {value}", file=sys.stderr)
        print(f"ready in {ready_s:.1f} s", file=sys.stderr, flush=True)

    serve(Backend(), settings, listening, load, [add_page])
    if not args.json:
        print("foreroute serve  stopped", file=sys.stderr)
    return 0


def _names(args: argparse.Namespace, folder: Path, model: str) -> tuple[str, ...]:
    """Names that requests may use for the model; they must be text, as answers quote them."""
    given = args.served_model_name or [folder.resolve().name if Path(model).exists() else model]
    return tuple(options.argument_text(name, "The model's name (--served-model-name)") for name in given)


def _limits(args: argparse.Namespace) -> "Limits":
    """Limits of requests: none may ask for more answers than can be queued together, as it would wait for ever."""
    from foreroute.server.settings import Limits, idle_connections_of
    from foreroute.system.limits import most_open_files

    idle = idle_connections_of(most_open_files()[0])
    most = args.max_waiting + args.max_num_seqs
    return Limits(prompts=min(Limits.prompts, most), choices=min(Limits.choices, most), idle_connections=idle)


def _model(args: argparse.Namespace) -> str:
    if (args.model is None) == (args.model_flag is None):
        what = "There is no model" if args.model is None else "There are two models"
        raise ForerouteError(f"{what}. Give one: foreroute serve MODEL.")
    return args.model or args.model_flag


def reading_of(backend: "Backend") -> "Progress":
    """What reports to `backend` how far the reading is, a share of a start between the tokenizer and the engine.

    The total grows when the dense weights are there and host memory is still to be filled: a part is left for that, so
    that it never goes back.
    """
    dense_bytes, reached = 0, 0.0

    def report(done: int, total: int) -> None:
        nonlocal dense_bytes, reached
        dense_bytes = dense_bytes or total
        if total == dense_bytes:
            share = _DENSE_SHARE * done / max(total, 1)
        else:
            share = _DENSE_SHARE + (1 - _DENSE_SHARE) * (done - dense_bytes) / (total - dense_bytes)
        reached = max(reached, share)
        backend.report("reading what stays in memory", 0.4 + 0.5 * reached)

    return report


def _load(
    backend: "Backend",
    folder: Path,
    args: argparse.Namespace,
    config: "EngineConfig",
    settings: "ServerSettings",
    calls: "Format | None",
) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Load the model and start answering. Returns the memory decisions, as text and as figures."""
    backend.report("importing torch and transformers", 0.0)
    import foreroute
    from foreroute.batching.engine import BatchEngine
    from foreroute.model.text import load_tokenizer
    from foreroute.server.backend import Prompts, Serving
    from foreroute.structured.compiler import GrammarCompiler

    options.apply_threads(args)
    config, context = requests.with_room(folder, config, args)
    backend.report("reading the tokenizer", 0.3)
    tokenizer = load_tokenizer(folder)
    backend.report("reading what stays in memory", 0.4)
    model = foreroute.load(folder, dtype=args.dtype, config=config, progress=reading_of(backend))
    plan, text_config = model.foreroute.plan, model.config.get_text_config()
    backend.report("starting the engine", 0.9)
    why_no_chat = ""
    if text_config.is_encoder_decoder:
        why_no_chat = f"{plan.model_type} is an encoder-decoder: it answers one text, and no chat. Use /v1/completions."
    prompts = Prompts(tokenizer, text_config.vocab_size, settings.limits, why_no_chat, calls)
    prompts.start()
    needs = requests.needs_of(model, context)
    kv_tokens = plan.kv_tokens if needs is None else needs.kv_tokens
    kept_in = None if config.prefix_cache_dir is None else Path(config.prefix_cache_dir)
    engine = BatchEngine(model, tokenizer, context, args.max_num_seqs, args.max_waiting, kv_tokens, kept_in)
    info = {
        "tokenizer_class": type(tokenizer).__name__,
        "eos_token": tokenizer.eos_token,
        "bos_token": tokenizer.bos_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": prompts.template,
        "model_max_length": context,
        "vocab_size": text_config.vocab_size,
    }
    grammars = GrammarCompiler.of(model, tokenizer)
    backend.ready(Serving(engine, prompts, context, info, model, grammars=grammars))
    names = ", ".join(settings.served_names)
    at_once = f"{engine.rows} at a time" if engine.rows > 1 else "one at a time"
    if engine.why_one_row and args.max_num_seqs > 1:
        at_once += f" ({engine.why_one_row})"
    chosen = " (chosen)" if plan.memory_was_chosen else ""
    lines = {
        "model": f"{names}: {plan.model_type}, {plan.num_layers} x {plan.num_experts} experts, {plan.compute_dtype}",
        "experts": f"{plan.num_slots} of {plan.total_slots} ({plan.resident_share:.0%}) in "
        f"{format_memory(plan.memory_bytes)}{chosen}",
        "memory": f"{format_memory(plan.dense_bytes)} for the dense weights"
        if needs is None
        else requests.in_words(needs),
        "context": f"{context} tokens",
        "requests": f"{at_once}, {args.max_waiting} may wait; together at most {engine.kv_tokens} tokens "
        f"({format_memory(engine.kv_bytes)})",
        "tools": prompts.calls_in_words(),
        "policy": config.policy,
        **({"draft": config.draft} if config.draft else {}),
        "key": "needed" if settings.api_keys else "none",
        "page": "/" if settings.allow_pages else "off",
    }
    return lines, None if needs is None else requests.as_json(needs)
