"""What all scripts share on the command line: messages, errors in one line, one way to parse."""

import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterable
from typing import Literal

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
    """Run a script's main function; a UserError ends in one line and status 2.

    A reader of the output that has seen enough (`| head -1`) gives status 141, as SIGPIPE does.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        sys.exit(141)
    except UserError as e:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"error{where}: {e}", file=sys.stderr, flush=True)
        if rank == "0":
            repeat_after_torchrun(f"error: {e}")
        else:
            time.sleep(1)  # torchrun ends the others once one has ended: rank 0 is to report first
        sys.exit(2)


REPEAT = r"""
for i in $(seq 600); do
    kill -0 "$1" 2>/dev/null || break
    grep -qs "^State:.Z" "/proc/$1/status" && break
    sleep 0.1
done
printf "\n%s\n" "$2" >&2
"""


def repeat_after_torchrun(message: str):
    """Print a message again after torchrun has ended: its own report is 40 lines long.

    A shell waits for that in the background, for 60 s at most. torchrun may stay a zombie until its
    parent has read the last output, which this shell holds open: a zombie counts as ended.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restarts is None or restarts != os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
        return  # not under torchrun, or it will try again
    command = ["sh", "-c", REPEAT, "sh", str(os.getppid()), message]
    with contextlib.suppress(OSError):  # no shell
        subprocess.Popen(command, start_new_session=True)


# --------------------------------------------------------------------------------------------------
# parsing

# Options are written --like_this or --like-this.
STYLE = {"use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}
POSITIONAL = typing.get_args(tyro.conf.Positional[str])[1]  # tyro's mark
TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")


def parse(what, args: list[str] | None = None, advice: dict[str, str] | None = None, **more):
    """Build a dataclass from a command line (default: sys.argv), or call a function.

    Integers may be written 1e4 or 2**19; booleans as --flag, --no-flag, or with a value. Raises
    UserError for unknown options; `advice` says what names that others use are called here.
    The rest is tyro.cli(), which gets `more`.
    """
    args = sys.argv[1:] if args is None else args
    args = canonical(args, option_types(what), advice or {})
    return tyro.cli(what, args=args, **STYLE, **more)


def parse_command(commands: dict[str, Callable], description: str):
    """Run one of several commands, chosen by the first word of the command line."""
    args = sys.argv[1:]
    if args and args[0] in commands:
        args = args[:1] + canonical(args[1:], option_types(commands[args[0]]), {})
    return tyro.extras.subcommand_cli_from_dict(
        commands, args=args, description=description, **STYLE
    )


def option_types(what) -> dict[str, object]:
    """Return the type of each option: of a function's parameters or of a dataclass's fields.

    Fields that are dataclasses themselves count as groups of options.
    """
    if dataclasses.is_dataclass(what):
        annotations = {field.name: field.type for field in dataclasses.fields(what)}
    else:
        parameters = inspect.signature(what).parameters.values()
        annotations = {parameter.name: parameter.annotation for parameter in parameters}
    types = {}
    for name, annotation in annotations.items():
        group = typing.get_args(annotation)[:1]  # of Annotated
        if group and dataclasses.is_dataclass(group[0]):
            types |= option_types(group[0])
        else:
            types[name] = annotation
    return types


def canonical(args: list[str], types: dict[str, object], advice: dict[str, str]) -> list[str]:
    """Rewrite a command line in the form that tyro takes.

    Raises UserError for unknown options, and for values of a wrong type.
    """
    out, wrong = [], []
    positional = any(POSITIONAL in typing.get_args(option_type) for option_type in types.values())
    i = 0
    while i < len(args):
        if not args[i].startswith("--") or args[i] == "--help":
            out.append(args[i])
            i += 1
            continue
        name, equals, value = args[i][2:].partition("=")
        name = name.replace("-", "_")
        positive = name.removeprefix("no_")
        i += 1
        if name not in types and types.get(positive) is bool and not equals:
            out += [f"--{positive}", "False"]
            continue
        if name not in types:
            wrong.append(f"no option --{name}: {advice.get(name) or near(name, types)}")
            continue
        if types[name] is bool:
            word = "--" if equals or i == len(args) else args[i]
            # in `audit.py --contents DIR` the word after the flag is not its value
            if not word.startswith("--") and (word.lower() in TRUE + FALSE or not positional):
                value = word
                i += 1
            value = boolean(value)
        elif not equals and i < len(args) and not args[i].startswith("--"):
            value = args[i]
            i += 1
        elif not equals:
            wrong.append(f"--{name} has no value; one that begins with -- is --{name}=VALUE")
            continue
        value = integer(value) if int in alternatives(types[name]) else value
        problem = value_problem(value, types[name])
        if problem:
            wrong.append(f"--{name} is {value!r}, {problem}")
        if value.startswith("-") and not is_number(value):
            out.append(f"--{name}={value}")  # by itself it would be taken for an option
        else:
            out += [f"--{name}", value]
    if wrong:
        raise UserError(f"{'; '.join(wrong)}; hint: --help lists all options")
    return out


def is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def alternatives(option_type) -> tuple:
    """Return the members of a union, or the type itself."""
    return typing.get_args(option_type) or (option_type,)


def value_problem(value: str, option_type) -> str:
    """Return what is wrong with the value of an option; "" when nothing is, or tyro has to tell."""
    choices, numbers = [], []
    for part in alternatives(option_type):
        if typing.get_origin(part) is Literal:
            choices += typing.get_args(part)
        elif isinstance(part, str):  # of a plain Literal
            choices.append(part)
        elif part in (int, float, bool):
            numbers.append(part)
        elif part is type(None):
            choices.append("None")
        else:
            return ""
    if value in choices or (bool in numbers and value in ("True", "False")):
        return ""
    for number in (int, float):
        try:
            if number in numbers:
                number(value)
                return ""
        except ValueError:
            pass
    names = {int: "a whole number", float: "a number", bool: "True or False"}
    expected = [names[number] for number in numbers] + [c for c in choices if c != "None"]
    return f"expected {' or '.join(dict.fromkeys(expected))}"


def boolean(value: str) -> str:
    """Return the True or False that a word means; no word means True."""
    if value.lower() in FALSE:
        return "False"
    return "True" if value == "" or value.lower() in TRUE else value


def integer(value: str) -> str:
    """Return 10000 for 1e4, 524288 for 2**19; anything else as it is."""
    power = re.fullmatch(r"(\d+)\*\*(\d{1,3})", value)
    if power:
        return str(int(power[1]) ** int(power[2]))
    if re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d{1,2}", value) and float(value).is_integer():
        return str(int(float(value)))
    return value
