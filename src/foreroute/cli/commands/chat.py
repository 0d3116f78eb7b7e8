"""`foreroute chat`: a conversation in the terminal; each prompt token is computed once."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.locate import locate
from foreroute.cli import chat_view, figures, options
from foreroute.cli.chat_session import SETTINGS, Conversation, read_setting
from foreroute.cli.commands.generate import add_sampling
from foreroute.errors import ForerouteError, PromptError

if TYPE_CHECKING:
    from foreroute.generation.generate import GenerationReport
    from foreroute.loading.offloaded_model import OffloadedModel

_MAX_NEW_TOKENS = 512

_COMMANDS = {
    "/help": "this list",
    "/system": "[TEXT]  set the system message; without TEXT, remove it",
    "/set": "[KEY VALUE]  change a setting of the next answers; without KEY, show all",
    "/save": "FILE  write the chat as JSON",
    "/load": "FILE  continue a saved chat",
    "/stats": "what the last answer took: hits, MB per token, stall, TPOT",
    "/clear": "begin anew; settings and system message stay",
    "/exit": "leave, as Ctrl-D does",
}

_EPILOG = """\
in the chat:
  /help lists the commands; a line that ends in \\ continues on the next one.
  Ctrl-C stops an answer, and keeps what was written of it; Ctrl-D leaves.
  Keys and values of the chat so far are kept, so that a turn computes only its
  new tokens; /stats shows how many.

examples:
  foreroute chat MODEL --memory 8GiB
  foreroute chat MODEL --system "Answer in one sentence." --temperature 0.7
  printf 'Hello\\n/stats\\n' | foreroute chat MODEL --plain

Answers go to standard output, all else to standard error. A model without a
chat template continues the text of the chat; it may not answer."""


def add_parser(commands: Any) -> None:
    """Add `chat` to the commands."""
    parser = commands.add_parser(
        "chat",
        help="chat in the terminal",
        usage="foreroute chat MODEL [flags]",
        description="Chat with a model; earlier turns are not computed again.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--load", type=Path, metavar="FILE", help="continue a chat that /save wrote")
    parser.add_argument(
        "--plain", action="store_true", help="answers as they are, not as markdown (default: off a terminal)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the warnings of libraries")
    add_sampling(parser, max_new_tokens=_MAX_NEW_TOKENS)
    # None marks a flag that was not given: a saved chat then keeps its own value.
    parser.set_defaults(max_new_tokens=None)
    options.add_model_options(parser)
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    conversation, config = _begin(args), options.engine_config(args)
    folder = locate(args.model)
    options.quiet_libraries(args)
    with figures.busy("Loading the model", is_quiet=False):
        import foreroute
        from foreroute.model.config_file import read_config, refuse_encoder_decoder
        from foreroute.model.text import load_tokenizer

        options.apply_threads(args)
        refuse_encoder_decoder(read_config(folder), folder, "It answers one text, and no chat: foreroute generate.")
        tokenizer = load_tokenizer(folder)
        model = foreroute.load(folder, dtype=args.dtype, config=config)
    with closing(model.foreroute):
        chat = Chat(model, tokenizer, args.model, conversation, is_markdown=sys.stdout.isatty() and not args.plain)
        chat.greet()
        for line in _lines():
            if not chat.take(line):
                break
    return 0


def _begin(args: argparse.Namespace) -> Conversation:
    """Start the chat that the flags ask for; flags win over a saved chat."""
    conversation = Conversation() if args.load is None else Conversation.load(args.load)
    if args.system is not None:
        conversation.system = options.argument_text(args.system, "--system")
    for name in SETTINGS:
        # The policy is a flag of the engine and is set when the model is loaded.
        if name != "policy" and (value := getattr(args, name)) is not None:
            conversation.set(name, value)
    conversation.settings.setdefault("max_new_tokens", _MAX_NEW_TOKENS)
    if args.do_sample is not None and not args.do_sample:
        conversation.set("temperature", 0)
    elif args.do_sample:
        conversation.settings.setdefault("temperature", 1.0)
    return conversation


class Chat:
    """Takes the user's lines: runs commands, and answers everything else.

    Args:
        name: the model's name as the user gave it.
        is_markdown: render answers as markdown.
    """

    def __init__(
        self, model: "OffloadedModel", tokenizer: Any, name: str, conversation: Conversation, *, is_markdown: bool
    ) -> None:
        from foreroute.generation.prefix_cache import PromptCache

        self._model = model
        self._tokenizer = tokenizer
        self._name = name
        self._conversation = Conversation(list(conversation.messages), None, {})
        self._is_markdown = is_markdown
        self._is_plain_text = not getattr(tokenizer, "chat_template", None)
        asked = model.foreroute.plan.prefix_cache
        self._cache = PromptCache() if asked is None else PromptCache(asked)
        self._last: GenerationReport | None = None
        self._num_answers = 0
        self._console = figures.stderr_console()
        self._adopt(conversation)

    def greet(self) -> None:
        """Print the greeting."""
        plan = self._model.foreroute.plan
        self._tell(f"{self._name}: {plan.num_slots} of {plan.total_slots} experts in memory. /help lists commands.")
        if self._is_plain_text:
            self._tell(
                "This model has no chat template: it was not trained to answer. It continues your text, line by line."
            )

    def take(self, line: str) -> bool:
        """Handle one line from the user; return False when the chat is over. Errors are printed; the chat goes on."""
        text = line.strip()
        if not text:
            return True
        try:
            if text.startswith("/"):
                name, _, rest = text.partition(" ")
                if name == "/exit":
                    return False
                self._do(name, rest.strip())
            else:
                self._answer(line)
        except ForerouteError as error:
            self._tell(f"error: {error}", "red")
        return True

    def _do(self, name: str, rest: str) -> None:
        doing: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/system": self._system, "/set": self._set, "/save": self._save,
            "/load": self._load, "/stats": self._stats, "/clear": self._clear,
        }  # fmt: skip
        if name not in doing:
            raise PromptError(f"There is no command {name}. There are: {', '.join(_COMMANDS)}.")
        doing[name](rest)

    # Answering.

    def _answer(self, text: str) -> None:
        from foreroute.generation.generate import generate

        talk = self._conversation
        talk.say("user", text)
        report = None
        try:
            prompt_ids = talk.prompt_ids(self._tokenizer, is_plain=self._is_plain_text)
            with chat_view.MarkdownAnswer() if self._is_markdown else chat_view.plain_answer() as write:
                report = generate(
                    self._model, self._tokenizer, prompt_ids, on_text=write, reuse=self._cache, **self._sampling()
                )
        except PromptError as error:
            if "context" in str(error):
                raise PromptError(f"{error} /clear begins anew; /save keeps what was said.") from error
            raise
        except KeyboardInterrupt:
            # Raised between the model and the screen: `report` is set if the answer had ended.
            pass
        finally:
            if report is None:
                # Drop the question: two user turns in a row confuse a model, and some templates.
                talk.messages.pop()
        if report is None:
            self._tell("stopped before an answer began")
            return
        self._last = report
        self._num_answers += 1
        if report.text:
            talk.say("assistant", report.text)
        else:
            talk.messages.pop()
        ends = {"interrupted": "stopped; what was said stays", "length": "cut off: raise it with /set max_new_tokens"}
        if report.finish_reason in ends:
            self._tell(ends[report.finish_reason])
        elif not report.text:
            self._tell("the model said nothing")

    def _sampling(self) -> dict[str, Any]:
        """Sampling arguments for generate; as in `foreroute generate`, a temperature turns sampling on."""
        told = {name: value for name, value in self._conversation.settings.items() if name not in ("seed", "policy")}
        if told.get("temperature") == 0:
            for name in ("temperature", "top_k", "top_p", "min_p"):
                told.pop(name, None)
            told["do_sample"] = False
        elif told.keys() & {"temperature", "top_k", "top_p", "min_p"}:
            told["do_sample"] = True
        return told

    # Commands.

    def _help(self, rest: str) -> None:
        figures.print_rows(self._console, [(name, *_usage(name)) for name in _COMMANDS])

    def _system(self, rest: str) -> None:
        if self._is_plain_text:
            raise PromptError("This model has no chat template, and so no system message.")
        self._conversation.system = rest or None
        self._tell("system message set" if rest else "no system message")

    def _set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        if not name:
            now = self._conversation.settings
            values = {name: str(now.get(name, "default")) for name in SETTINGS}
            if "policy" not in now:
                values["policy"] = str(self._model.foreroute.policies[0])
            figures.print_rows(self._console, [(name, values[name], SETTINGS[name][1]) for name in SETTINGS])
            return
        if name in SETTINGS and not text.strip():
            raise PromptError(f"/set {name} needs a value: {SETTINGS[name][1]}.")
        value = read_setting(name, text.strip())
        self._apply(name, value)
        self._conversation.set(name, value)
        self._tell(f"{name} is {'default' if value is None else value}")

    def _apply(self, name: str, value: Any) -> None:
        """Apply settings that act at once: the policy (which may be refused) and the seed."""
        if name == "policy":
            self._model.foreroute.set_policy("exact" if value is None else value)
        elif name == "seed" and value is not None:
            import torch

            torch.manual_seed(value)

    def _save(self, rest: str) -> None:
        self._conversation.save(_path(rest, "/save"), self._name)
        self._tell(f"{len(self._conversation.messages)} messages are in {rest}")

    def _load(self, rest: str) -> None:
        self._adopt(Conversation.load(_path(rest, "/load")))
        self._tell(f"{len(self._conversation.messages)} messages from {rest}")

    def _adopt(self, conversation: Conversation) -> None:
        """Continue this chat; change nothing where the model cannot."""
        if conversation.system is not None and self._is_plain_text:
            raise PromptError("The chat has a system message, and this model no chat template for it.")
        for name, value in conversation.settings.items():
            self._apply(name, value)
        self._conversation = conversation

    def _stats(self, rest: str) -> None:
        if self._last is None:
            raise PromptError("There is no answer yet, so no figures.")
        plan = self._model.foreroute.plan
        figures.print_rows(self._console, chat_view.stats_rows(self._last, plan, self._num_answers))

    def _clear(self, rest: str) -> None:
        self._conversation.messages.clear()
        self._cache.clear()
        self._tell("a new chat")

    def _tell(self, text: str, style: str = "dim") -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=True)


def _usage(name: str) -> tuple[str, str]:
    """Return a command's arguments and meaning."""
    what = _COMMANDS[name]
    arguments, gap, meaning = what.partition("  ")
    return (arguments, meaning) if gap else ("", what)


def _path(text: str, command: str) -> Path:
    if not text:
        raise PromptError(f"{command} needs a FILE.")
    return Path(text).expanduser()


def _lines() -> Iterator[str]:
    """Yield the user's lines until Ctrl-D or the end of input; a backslash at a line's end joins the next line."""
    read = _typed() if sys.stdin.isatty() else _piped()
    begun: list[str] = []
    for line in read:
        if line.endswith("\\"):
            begun.append(line[:-1])
            continue
        yield "\n".join([*begun, line])
        begun.clear()
    if begun:
        yield "\n".join(begun)


def _piped() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PromptError(f"Line {number} of standard input is not UTF-8 text (byte {error.start}).") from None


def _typed() -> Iterator[str]:
    import readline

    def complete(text: str, state: int) -> str | None:
        fitting = [name for name in _COMMANDS if name.startswith(text)] if text.startswith("/") else []
        return fitting[state] if state < len(fitting) else None

    # Lines can be recalled with the arrow keys, and are saved nowhere.
    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    while True:
        try:
            yield options.argument_text(input("\n> "), "The line")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
