"""What all scripts share on the command line: messages, errors in one line, one way to parse."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Literal, TextIO

import tyro


class UserError(Exception):
    """A mistake by the user, shown as one line `error: ...; hint: ...` without a traceback.

    Several mistakes are joined by a newline and seven blanks. Any other newline is written out, and
    the middle of a long text left out: either may come from a file that the text quotes.
    """

    status = 2  # of the process

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > 4000:
            text = f"{text[:3000]} ... {text[-995:]}"  # the hint is at the end
        return re.sub(r"\n(?! {7})", r"\\n", text)


def one_line(e: BaseException) -> str:
    """Return an exception as part of a message: its type, the first 160 characters of its text."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def suggest(word: str, words: Iterable[str]) -> str:
    """Suggest the names closest to a mistyped one, or list all of them when none is close."""
    close = difflib.get_close_matches(word, words, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"one of {', '.join(words)}"


def printable(text: str) -> str:
    """Return text with control characters written out, so that a terminal does not obey them.

    Newlines and tabs stay. For whatever others have written: models, prompts, files, paths.
    """
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# C0 and C1 without newline and tab, Unicode's own line ends, what changes the direction of writing,
# and halves of surrogate pairs, which no encoding has
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def show(text: str, console: TextIO | None = None):
    """Write text to a console (default: stdout), without a line end.

    Control characters are written out, and what the console's alphabet lacks is replaced.
    """
    console = console or sys.stdout
    text = printable(text)
    try:
        print(text, end="", flush=True, file=console)
    except UnicodeEncodeError:
        alphabet = console.encoding
        print(text.encode(alphabet, "replace").decode(alphabet), end="", flush=True, file=console)


def rank() -> str:
    """Return this process's number under torchrun; "0" without it."""
    return os.environ.get("RANK") or "0"


def say(message: str, console: TextIO | None = None):
    """Print one line on rank 0. A console that is gone, or on a full disk, never stops a run."""
    if rank() != "0":
        return
    try:
        show(f"{message}\n", console)
    except BrokenPipeError:
        if console is None:
            leave_pipe()
    except OSError:
        pass


def leave_pipe():
    """Write nothing more to stdout, whose reader has seen enough (`| head`)."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  stays open until the process ends


def last_words(message: str):
    """Print to stderr for a second at most: what hangs may be the disk or the pipe behind it."""

    def write():
        with contextlib.suppress(OSError):
            show(f"{message}\n", sys.stderr)

    writer = threading.Thread(target=write, daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads
        writer.start()
        writer.join(1)


def run_script(main: Callable[[], None]):
    """Run a script's main function; a UserError ends in one line and its status.

    Ctrl-C ends it as it ends any program, so that a shell's loop ends, too.
    """
    interrupted = False
    try:
        main()
    except UserError as e:
        where = "" if rank() == "0" else f" (rank {rank()})"
        message = f"error{where}: {e}"
        with contextlib.suppress(OSError):  # of a full disk, say: the status is to be e's
            show(f"{message}\n", sys.stderr)
        repeat_after_torchrun(printable(message))
        if rank() != "0":
            time.sleep(1)  # torchrun ends the others once one has ended: rank 0 is to report first
        sys.exit(e.status)
    except BrokenPipeError:
        if not reader_is_gone():  # of another pipe
            raise
        leave_pipe()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        try:
            sys.stdout.flush()  # of --help, for example
        except BrokenPipeError:
            leave_pipe()
    if interrupted:
        with contextlib.suppress(OSError):
            show("interrupted\n", sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def reader_is_gone() -> bool:
    """Return whether stdout is a pipe whose reader has closed it."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is not a file, or closed
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


REPEAT = r"""
for i in $(seq 600); do
    kill -0 "$1" 2>/dev/null || break
    grep -qs "^State:.Z" "/proc/$1/status" && break
    sleep 0.1
done
[ "$3" = 0 ] || sleep 0.5
once="${TMPDIR:-/tmp}/reported-by-torchrun-$1"
mkdir "$once" 2>/dev/null || exit
printf "\n%s\n" "$2" >&2
exec >&- 2>&-
sleep 2
rmdir "$once"
"""


def repeat_after_torchrun(message: str):
    """Print a message again after torchrun has ended: its own report is 40 lines long.

    A shell waits for that in the background, for 60 s at most. torchrun may stay a zombie until its
    parent has read the last output, which this shell holds open: a zombie counts as ended. Only one
    rank of a machine prints its message, rank 0 if it has one.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restarts is None or restarts != os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
        return  # not under torchrun, or it will try again
    command = ["sh", "-c", REPEAT, "sh", str(os.getppid()), message, rank()]
    with contextlib.suppress(OSError):  # no shell
        subprocess.Popen(command, start_new_session=True)


# --------------------------------------------------------------------------------------------------
# parsing

# Options are written --like_this or --like-this.
STYLE = {"use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}
TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")


# A path as an option: ~ is the home directory, also behind "=", where no shell replaces it.
PathText = Annotated[
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: os.path.expanduser(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]


def parse(what, args: list[str] | None = None, advice: dict[str, str] | None = None, **more):
    """Build a dataclass from a command line (default: sys.argv).

    Integers may be written 1e4 or 2**19; booleans as --flag, --no-flag, or with a value. Raises
    UserError for mistakes; `advice` says what names that others use are called here. The rest is
    tyro.cli(), which gets `more`.
    """
    args = sys.argv[1:] if args is None else args
    args = canonical(args, option_types(what), advice or {})
    with errors_in_one_line():
        return tyro.cli(what, args=args, **STYLE, **more)


def parse_command(commands: dict[str, Callable], description: str):
    """Run one of several commands, chosen by the first word of the command line."""
    args = sys.argv[1:]
    if args and args[0] in commands:
        args = args[:1] + canonical(args[1:], option_types(commands[args[0]]), {})
    classes = {name: command for name, command in commands.items() if inspect.isclass(command)}
    functions = {name: deferred(commands[name]) for name in commands.keys() - classes.keys()}
    in_order = {name: (classes | functions)[name] for name in commands}
    with errors_in_one_line():
        result = tyro.extras.subcommand_cli_from_dict(
            in_order, args=args, description=description, **STYLE
        )
    return result() if args[0] in functions else result


def deferred(function: Callable) -> Callable:
    """Return a function of the same signature that returns the call instead of making it."""

    @functools.wraps(function)
    def call_later(*args, **kwargs):
        return functools.partial(function, *args, **kwargs)

    return call_later


@contextlib.contextmanager
def errors_in_one_line():
    """Inside the block, raise what tyro prints about a mistake, a box, as a UserError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as e:
        if not e.code:  # --help
            raise
        lines = [line.strip(BOX) for line in printed.getvalue().split("\n")]
        text = " ".join(line for line in lines[1:] if line).partition("For full helptext")[0]
        raise UserError(f"{text.strip()}; hint: --help lists all options") from None


BOX = " ╭╮╰╯─│|-"


def option_types(what) -> dict[str, object]:
    """Return the type of each option: of a function's parameters or of a dataclass's fields.

    Fields that are dataclasses themselves count as groups of options. Positional ones have the
    name "".
    """
    if dataclasses.is_dataclass(what):
        annotations = {field.name: field.type for field in dataclasses.fields(what)}
    else:
        parameters = inspect.signature(what).parameters.values()
        annotations = {parameter.name: parameter.annotation for parameter in parameters}
    types = {}
    for name, annotation in annotations.items():
        group, *marks = typing.get_args(annotation) or (annotation,)
        if dataclasses.is_dataclass(group):
            types |= option_types(group)
        elif tyro.conf.Positional in marks:
            types[""] = group
        else:
            types[name] = annotation
    return types


# Any other word is a value, such as the prompt "--> x".
OPTION = re.compile(r"--[A-Za-z_][\w-]*(=|\Z)")


def canonical(args: list[str], types: dict[str, object], advice: dict[str, str]) -> list[str]:
    """Rewrite a command line in the form that tyro takes.

    Raises UserError for unknown options, for words that belong to none, and for values that are
    too few, too many, or of a wrong type.
    """
    out, wrong = [], []
    words = list(args)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help") or ("" in types and not OPTION.match(word)):
            out.append(word)
            continue
        if not OPTION.match(word):
            why = advice.get(word, "options begin with --")
            wrong.append(f"{word!r} belongs to no option: {why}")
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        positive = name.removeprefix("no_")
        if name not in types and types.get(positive) is bool and not equals:
            name = positive
            values = ["False"]
        elif name not in types:
            wrong.append(f"no option --{name}: {advice.get(name) or suggest(name, types)}")
            take_values(words, tuple[str, ...])
            continue
        else:
            values = [value]
            if not equals:
                # in `audit.py --contents DIR` the word after the flag is not its value
                alone = types[name] is bool and "" in types
                alone = alone and words[:1] and words[0].lower() not in TRUE + FALSE
                values = [] if alone else take_values(words, types[name])
        values, problem = checked_values(values, types[name])
        if problem:
            wrong.append(f"--{name} {problem}")
        elif len(values) == 1 and values[0].startswith("-") and not is_number(values[0]):
            out.append(f"--{name}={values[0]}")  # by itself it would be taken for an option
        else:
            out += [f"--{name}", *values]
    if wrong:
        raise UserError(f"{'; '.join(wrong)}; hint: --help lists all options")
    return out


def value_types(option_type) -> tuple[list, bool]:
    """Return the types of an option's values, and whether the last may come any number of times."""
    if typing.get_origin(option_type) is not tuple:
        return [option_type], False
    types = [part for part in typing.get_args(option_type) if part is not ...]
    return types, ... in typing.get_args(option_type)


def take_values(words: list[str], option_type) -> list[str]:
    """Remove an option's values from the front of `words` and return them."""
    types, any_number = value_types(option_type)
    values = []
    while words and not OPTION.match(words[0]) and (any_number or len(values) < len(types)):
        values.append(words.pop(0))
    return values


def checked_values(values: list[str], option_type) -> tuple[list[str], str]:
    """Return an option's values as tyro takes them, and what is wrong with them, "" for nothing."""
    types, any_number = value_types(option_type)
    if option_type is bool:
        values = [boolean(value) for value in values or [""]]
    elif not values and len(types) == 1 and not any_number:
        return values, "has no value; one that begins with -- needs = before it"
    elif len(values) != len(types) and not any_number:
        return values, f"is {' '.join(values)!r}, expected {len(types)} values, blanks between them"
    checked = []
    for i, value in enumerate(values):
        value_type = types[0 if any_number else i]
        value = integer(value) if int in alternatives(value_type) else value
        problem = value_problem(value, value_type)
        if problem:
            return values, f"is {value!r}, {problem}"
        checked.append(value)
    return checked, ""


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
