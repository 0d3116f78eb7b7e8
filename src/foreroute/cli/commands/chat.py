"""`foreroute chat`: a conversation in the terminal; each prompt token is computed once."""

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.locate import locate
from foreroute.cli import chat_view, figures, options
from foreroute.cli.chat_session import SETTINGS, Conversation, read_setting
from foreroute.cli.commands.generate import add_sampling
from foreroute.cli.terminal.lines import history_file, messages
from foreroute.errors import ForerouteError, PromptError

if TYPE_CHECKING:
    import torch

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
    "/undo": "take back the last question and its answer",
    "/retry": "answer the last question again, in place of that answer",
    "/clear": "begin anew; settings and system message stay",
    "/exit": "leave, as /quit, /bye and Ctrl-D do",
}
_LEAVE = ("/exit", "/quit", "/bye")

_EPILOG = """\
in the chat:
  /help lists the commands; a line that ends in \\ continues on the next one,
  \"\"\" begins and ends a block of lines, and pasted lines are one message.
  Ctrl-C stops an answer, and keeps what was written of it; Ctrl-D leaves.
  Keys and values of the chat so far are kept, so that a turn computes only its
  new tokens; /stats shows how many.

examples:
  foreroute chat MODEL --memory 8GiB
  foreroute chat MODEL --system "Answer in one sentence." --temperature 0.7
  printf 'Hello\\n/stats\\n' | foreroute chat MODEL --plain

Answers go to standard output, all else to standard error. A model without a
chat template continues the text of the chat; it may not answer. When the
context is full, the oldest turns are left out, and a line says so. Lines that
you type are kept for the arrow keys, in foreroute/chat_history of
$XDG_STATE_HOME or ~/.local/state; --no-history keeps none."""


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
    parser.add_argument("--no-history", action="store_true", help="keep none of the lines that are typed")
    options.add_debug_options(parser)
    add_sampling(parser, max_new_tokens=_MAX_NEW_TOKENS)
    # None marks a flag that was not given: a saved chat then keeps its own value.
    parser.set_defaults(max_new_tokens=None)
    options.add_model_options(parser)
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    conversation, config = _begin(args), options.engine_config(args)
    folder = locate(options.alias_target(args, args.model))
    options.quiet_libraries(args)
    with figures.busy("Loading the model", is_quiet=False):
        import foreroute
        from foreroute.model.config_file import read_config, refuse_encoder_decoder
        from foreroute.model.text import load_tokenizer

        options.apply_threads(args)
        refuse_encoder_decoder(read_config(folder), folder, "It answers one text, and no chat: foreroute generate.")
        tokenizer = load_tokenizer(folder)
    with figures.loading(is_quiet=False) as progress:
        model = foreroute.load(folder, dtype=args.dtype, config=config, progress=progress)
    with closing(model.foreroute):
        chat = Chat(model, tokenizer, args.model, conversation, is_markdown=sys.stdout.isatty() and not args.plain)
        chat.greet()
        for said in messages([*_COMMANDS, *_LEAVE[1:]], None if args.no_history else history_file()):
            if not chat.take(said):
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
        self._hinted = False
        self._console = figures.stderr_console()
        self._adopt(conversation)

    def greet(self) -> None:
        """Print the greeting."""
        plan = self._model.foreroute.plan
        self._tell(f"{self._name}: {plan.num_slots} of {plan.total_slots} experts in memory. /help lists commands.")
        if self._conversation.messages:
            self._recall()
        if self._is_plain_text:
            self._tell(
                "This model has no chat template: it was not trained to answer. It continues your text, line by line."
            )

    def take(self, said: str) -> bool:
        """Handle one message from the user; return False when the chat is over. Errors are printed and end nothing."""
        text = said.strip()
        if not text:
            return True
        name, _, rest = text.partition(" ")
        hinted, self._hinted = self._hinted, False
        try:
            # Of several lines only a command that is known: a paste may begin with a path.
            if text.startswith("/") and ("\n" not in text or name in _COMMANDS):
                if name in _LEAVE:
                    return False
                self._do(name, rest.strip())
            elif f"/{text.lower()}" in _LEAVE and not hinted:
                self._hinted = True
                self._tell(f"/exit or Ctrl-D leaves; {text!r} once more says it to the model.")
            else:
                self._answer(said)
        except ForerouteError as error:
            self._tell(f"error: {error}", "red")
        return True

    def _do(self, name: str, rest: str) -> None:
        doing: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/system": self._system, "/set": self._set, "/save": self._save,
            "/load": self._load, "/stats": self._stats, "/clear": self._clear, "/undo": self._undo,
            "/retry": self._retry,
        }  # fmt: skip
        if name not in doing:
            raise PromptError(f"There is no command {name}. There are: {', '.join(_COMMANDS)}.")
        doing[name](rest)

    # Answering.

    def _answer(self, text: str) -> None:
        from foreroute.generation.generate import generate

        talk = self._conversation
        first = talk.first
        talk.say("user", text)
        report = None
        try:
            prompt_ids = self._prompt_ids()
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
                talk.first = first
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

    def _prompt_ids(self) -> "torch.Tensor":
        """Tokens of the chat [1, tokens]; leaves out its oldest turns where they leave an answer no room."""
        talk, is_plain = self._conversation, self._is_plain_text
        prompt_ids = talk.prompt_ids(self._tokenizer, is_plain=is_plain)
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if not context:
            return prompt_ids
        wanted = talk.settings.get("max_new_tokens")
        room = min(int(wanted or _MAX_NEW_TOKENS), int(context) // 4)
        before = talk.first
        # By a quarter more than needed, so that the next turns find their beginning kept.
        most = int(context) - room if prompt_ids.shape[1] <= context - room else (int(context) - room) * 3 // 4
        while prompt_ids.shape[1] > most and talk.drop_oldest():
            prompt_ids = talk.prompt_ids(self._tokenizer, is_plain=is_plain)
        if talk.first > before and prompt_ids.shape[1] < context:
            left_out = f"the oldest {talk.first} messages are left out from here on"
            self._tell(f"the context of {context:,} tokens is full: {left_out}; /save keeps them")
        return prompt_ids

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
        self._tell(f"loaded {rest}")
        self._recall()

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

    def _undo(self, rest: str) -> None:
        question = self._conversation.take_back()
        if question is None:
            raise PromptError("Nothing was asked yet.")
        self._tell(f"taken back: {_short(question)}")

    def _retry(self, rest: str) -> None:
        talk = self._conversation
        kept = list(talk.messages)
        question = talk.take_back()
        if question is None:
            raise PromptError("Nothing was asked yet.")
        old = kept[len(talk.messages) :]
        before = len(self._conversation.messages)
        answered = self._last
        try:
            self._answer(question)
        finally:
            if self._last is answered and len(self._conversation.messages) == before:
                # Stopped before an answer began: what was there stays.
                self._conversation.messages += old

    def _recall(self) -> None:
        """Show where a chat that was loaded had come to."""
        talk = self._conversation
        self._tell(f"{len(talk.messages)} messages so far; the last ones:")
        for turn in talk.messages[-2:]:
            self._tell(f"{'> ' if turn['role'] == 'user' else ''}{_short(figures.printable(turn['content']), 400)}")

    def _clear(self, rest: str) -> None:
        self._conversation.messages.clear()
        self._conversation.first = 0
        self._cache.clear()
        self._tell("a new chat")

    def _tell(self, text: str, style: str = "dim") -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=True)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} ..."


def _usage(name: str) -> tuple[str, str]:
    """Return a command's arguments and meaning."""
    what = _COMMANDS[name]
    arguments, gap, meaning = what.partition("  ")
    return (arguments, meaning) if gap else ("", what)


def _path(text: str, command: str) -> Path:
    if not text:
        raise PromptError(f"{command} needs a FILE.")
    return Path(text).expanduser()
