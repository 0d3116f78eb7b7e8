"""`foreroute run`: a chat, or with a prompt one answer: what other tools call run."""

import argparse
import sys
from typing import Any

from foreroute.cli import options
from foreroute.cli.commands import chat, generate

_MAX_NEW_TOKENS = 512

_EPILOG = """\
examples:
  foreroute run MODEL                                    as foreroute chat
  foreroute run MODEL "Why is the sky blue?"             as foreroute generate
  cat notes.txt | foreroute run MODEL --system "Summarise."

Without a prompt it is a conversation, unless text is piped in. `foreroute chat`
and `foreroute generate` have a few flags more, for saved chats and for answers
of a given form."""

# What the two commands read, and `run` has no flag for.
_OF_GENERATE = {"file": None, "chat": None, "json_schema": None, "regex": None, "grammar": None}
_OF_CHAT = {"load": None, "plain": False, "no_history": False}


def add_parser(commands: Any) -> None:
    """Add `run` to the commands."""
    parser = commands.add_parser(
        "run",
        help="chat, or with a PROMPT generate one answer",
        usage="foreroute run MODEL [PROMPT] [flags]",
        description="Chat with a model, or with a prompt generate one answer.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help='the prompt; "-" reads it from standard input')
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--quiet", action="store_true", help="with a prompt: print the text alone, without figures")
    options.add_common_options(parser)
    generate.add_sampling(parser, max_new_tokens=_MAX_NEW_TOKENS)
    options.add_model_options(parser)
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    is_chat = args.prompt is None and sys.stdin.isatty() and not args.json
    for name, value in (_OF_CHAT if is_chat else _OF_GENERATE).items():
        setattr(args, name, value)
    return chat.run(args) if is_chat else generate.run(args)
