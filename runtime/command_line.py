"""What all scripts share on the command line: messages, errors in one line, one way to parse."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable

import tyro


class UserError(Exception):
    """A mistake by the user, shown as one line `error: ...; hint: ...` without a traceback."""


def one_line(e: BaseException) -> str:
    """Return an exception as part of a message: its type, the first 160 characters of its text."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def near(word: str, words: Iterable[str]) -> str:
    """Suggest the names closest to a mistyped one, or list all of them when none is close."""
    close = difflib.get_close_matches(word, words, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"one of {', '.join(words)}"


def say(message: str):
    """Print one line on rank 0. A console that is gone, or on a full disk, never stops a run."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(message, flush=True)
    except UnicodeEncodeError:  # a console of another alphabet
        print(message.encode("ascii", "replace").decode(), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  stays open until the process ends
    except OSError:
        pass


def run_script(main: Callable[[], None]):
    """Run a script's main function; a UserError ends in one line and status 2."""
    try:
        main()
    except UserError as e:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"error{where}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)


# Options are written --like_this, and booleans take a value: --wandb_offline True.
STYLE = {"use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}


def parse(what, **options):
    """Call tyro.cli() in this project's style: build `what` (a class or function) from sys.argv."""
    return tyro.cli(what, **STYLE, **options)


def parse_command(commands: dict[str, Callable], description: str):
    """Run one of several commands, chosen by the first word of the command line."""
    return tyro.extras.subcommand_cli_from_dict(commands, description=description, **STYLE)
