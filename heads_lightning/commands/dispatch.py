"""Which commands there are, their help, and what happens when one fails.

A command is one entry of COMMANDS; one whose module is not there is not shown. Everything here runs before anything heavy is
imported.
"""

import contextlib
import errno
import importlib
import importlib.util
import logging
import os
import sys
import traceback as tracebacks
import warnings
from collections.abc import Callable
from typing import NamedTuple

from heads_lightning import __version__
from heads_lightning.registry import ConfigError, RunError, nearest
from heads_lightning.tracking.process import is_first_rank
from heads_lightning.tracking.stopping import Stopped, obey, raise_on_signals

PROGRAM = "heads-lightning"
OWN_WARNING = "heads_lightning"
COMPLETION = ("-sc", "--shell-completion")
QUIET = ("-q", "--quiet")
"""Say nothing but what went wrong: standard output is thrown away, warnings and errors are not."""
EXIT_CODES = {0: "done", 1: "failed, or found something wrong", 2: "a mistake in the command or its files", 130: "Ctrl-C", 143: "SIGTERM"}


class Command(NamedTuple):
    """A command of the program."""

    target: str
    """`module:function` below heads_lightning.commands; the function takes the arguments after the command's name."""
    summary: str
    """One line for the list of commands."""
    usage: str
    """What follows the command's name."""
    examples: tuple[str, str]
    """Two command lines, without the program's name."""


OVERRIDES = "[GROUP=OPTION …] [GROUP.FIELD=VALUE …]"
HYDRA_COMMANDS = ("train", "prepare")
"""Run through Hydra: its flags and completion work."""
READS_OVERRIDES = (*HYDRA_COMMANDS, "check", "config")
"""Take an experiment's overrides."""

COMMANDS: dict[str, Command] = {
    "train": Command("hydra_application:train", "prepare data, train, evaluate, save", f"{OVERRIDES} [-m] [--cfg job]", (
        "train experiment=fim_proof", "train -m objective=causal,fim head.loss_implementation=default,chunked")),
    "evaluate": Command("evaluate:main", "measure a trained model on held-out text", "checkpoint=RUN [KEY=VALUE …]", (
        "evaluate checkpoint=RUN", "evaluate checkpoint=RUN infill_lines=500")),
    "generate": Command("generate:main", "continue a text", "checkpoint=RUN [KEY=VALUE …] [-- TEXT]", (
        "generate checkpoint=RUN -- 'def main('", "generate checkpoint=RUN prompt_file=start.py")),
    "infill": Command("infill:main", "fill the gap between a prefix and a suffix", "checkpoint=RUN [KEY=VALUE …]", (
        "infill checkpoint=RUN prefix_file=a.py suffix_file=b.py", "infill checkpoint=RUN -- 'def f(' '): return 1'")),
    "prepare": Command("hydra_application:prepare", "tokenise the data of an experiment", OVERRIDES, (
        "prepare", "prepare data=files data.root=src tokenizer.vocab_size=8192")),
    "check": Command("check:main", "try an experiment out before it costs anything",
        f"{OVERRIDES} [mfu=SHARE] [device=NAME] [--json] [--config-only]", (
        "check trainer.devices=8 device=H100 mfu=0.4", "check --config-only --config-dir my_conf")),
    "list": Command("list:main", "options of every group, and fields of an option", "[GROUP[=OPTION]] [--json]", (
        "list head", "list objective=fim")),
    "config": Command("config:main", "the composed configuration, and where each value comes from", f"{OVERRIDES} [--json]", (
        "config objective=mlm head=mlm", "config experiment=fim_proof --json")),
    "schema": Command("schema:main", "JSON Schema of configuration files, for editors", "[GROUP] [--out FOLDER]", (
        "schema", "schema --out conf/schema")),
    "new": Command("new:main", "a working part of your own to start from", "head|objective|backbone|loss|study NAME [package=NAME]", (
        "new head my_head", "new objective my_objective package=my_lab")),
    "convert": Command("convert:main", "checkpoints to and from Hugging Face", "from=RUN|FOLDER out=FOLDER [KEY=VALUE …]", (
        "convert from=RUN to=huggingface out=exported", "convert from=downloaded/llama to=native out=llama")),
    "compare": Command("compare:main", "runs side by side, or the cells of a sweep", "RUN RUN … | SWEEP [by=MEASURE] [--json]", (
        "compare runs/a runs/b by=infill_bits_per_byte", "compare SWEEP")),
    "ui": Command("ui:main", "MLflow's pages on the store of the runs", "[run_root=FOLDER] [uri=STORE] [port=N]", (
        "ui", "ui run_root=elsewhere port=8080")),
    "runs": Command("runs:main", "runs in the run folder; --reap closes those without a process", "[run_root=FOLDER] [--reap] [--json]", (
        "runs", "runs --reap run_root=elsewhere")),
}  # fmt: skip


def available() -> dict[str, Command]:
    """Commands whose module exists."""
    return {name: command for name, command in COMMANDS.items() if _exists(name, command)}


def _exists(name: str, command: Command) -> bool:
    module = name if name in HYDRA_COMMANDS else command.target.split(":")[0]
    return importlib.util.find_spec(f"heads_lightning.commands.{module}") is not None


def run(arguments: list[str]) -> int:
    """Run the command that the arguments name."""
    first, rest = (arguments or ["--help"])[0], arguments[1:]
    if first in ("-h", "--help", "help"):
        print(program_help())
        return 0
    if first in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    if first.split("=")[0] in COMPLETION:
        return complete(arguments)
    commands = available()
    if first not in commands:
        raise ConfigError(unknown_command(first, commands))
    own, texts = _before_texts(rest)
    if any(word in ("-h", "--help") for word in own):
        print(command_help(first, commands[first]))
        return 0
    if not any(word in QUIET for word in own):
        return call(commands[first], rest)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return call(commands[first], [*(word for word in own if word not in QUIET), *texts])


def _before_texts(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of the command, and `--` with the texts that follow it, which may look like flags."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut:]


def call(command: Command, arguments: list[str]) -> int:
    """Import and call."""
    module, function = command.target.split(":")
    return int(getattr(importlib.import_module(f"heads_lightning.commands.{module}"), function)(arguments) or 0)


def unknown_command(word: str, commands: dict[str, Command]) -> str:
    """The refusal of a command that does not exist."""
    if "=" in word or word.startswith("-"):
        return f"`{word}` comes after a command, e.g. {PROGRAM} train {word}"
    return f"there is no command {word!r}.{nearest(word, commands)} Commands: {', '.join(commands)}"


def program_help() -> str:
    """What `--help` prints."""
    lines = [f"usage: {PROGRAM} COMMAND …    (COMMAND --help says more)", "", "Declarative experiments for language models.", ""]
    lines += [f"  {name:9} {command.summary}" for name, command in available().items()]
    lines += ["", "examples:", f"  {PROGRAM} train objective=mlm head=mlm", f"  {PROGRAM} list head", ""]
    lines += ["every command: --quiet says nothing but what went wrong; --json prints data as JSON where there is data to print", ""]
    lines += [f"exit codes: {', '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}", ""]
    lines += ["tab completion:", f'  eval "$({PROGRAM} -sc install=bash)"']
    return "\n".join(lines)


def command_help(name: str, command: Command) -> str:
    """What `COMMAND --help` prints."""
    lines = [f"usage: {PROGRAM} {name} {command.usage}", "", f"{command.summary[0].upper()}{command.summary[1:]}.", ""]
    if name in READS_OVERRIDES:
        from heads_lightning.commands.help import choices

        lines += [*choices(), ""]
    if name in HYDRA_COMMANDS:
        from heads_lightning.commands.help import HYDRA_FLAGS

        lines += [HYDRA_FLAGS, ""]
    else:
        lines += _fields_help(command)
    return "\n".join([*lines, "examples:", *(f"  {PROGRAM} {example}" for example in command.examples)])


def _fields_help(command: Command) -> list[str]:
    """The arguments of a command whose module declares them as the dataclass `Arguments`."""
    module = importlib.import_module(f"heads_lightning.commands.{command.target.split(':')[0]}")
    if not hasattr(module, "Arguments"):
        return []
    from heads_lightning.commands.arguments import describe

    return [*describe(module.Arguments), ""]


def complete(arguments: list[str]) -> int:
    """Tab completion: names of commands here, everything after a command by Hydra."""
    from heads_lightning.commands import hydra_application

    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if not any("query" in argument for argument in arguments):  # install, uninstall
        hydra_application.main("train", arguments)
    elif len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print(" ".join(available()))
    elif words[1] in READS_OVERRIDES:
        os.environ["COMP_LINE"] = line.replace(f"{words[1]} ", "", 1)
        hydra_application.main("train", arguments)
    elif words[1] == "list":
        from heads_lightning.composition.describe import groups

        print(" ".join(groups()))
    return 0


# ---------------------------------------------------------------------------------------------------------------- failing


def guarded(action: Callable[[], int], *, traceback: bool) -> int:
    """Call `action`; what it raises becomes an exit code and, for a user's mistake, one line on standard error."""
    logging.raiseExceptions = False  # `… | head` closes our output; logging would print a traceback for every line after that
    warnings.formatwarning = _plain_warning
    raise_on_signals()
    try:
        try:
            code = action()
            sys.stdout.flush()
            return code
        except Exception:
            obey()  # a signal in the middle of an import comes out as a broken module
            raise
    except (ConfigError, RunError) as error:
        if traceback:
            tracebacks.print_exc()
        _say(str(error), error)
        return 2 if isinstance(error, ConfigError) else 1
    except (KeyboardInterrupt, Stopped) as stop:
        if is_first_rank():
            _say("interrupted" if isinstance(stop, KeyboardInterrupt) else str(stop), stop)
        return 128 + stop.signal_number if isinstance(stop, Stopped) else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except Exception as error:
        _report_failure(error, full=traceback)
        return 1


def _say(text: str, error: BaseException) -> None:
    """What went wrong, and below it what the error was given on its way."""
    print("\n".join([f"{PROGRAM}: {text}", *getattr(error, "__notes__", ())]), file=sys.stderr)


def _plain_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Our own warnings (store.py names no file for them) in one line; others as Python writes them."""
    return f"{PROGRAM}: warning: {message}\n" if filename == OWN_WARNING else f"{filename}:{lineno}: {category.__name__}: {message}\n"


ON_THE_WAY = (
    "/hydra/",
    "heads_lightning/commands/dispatch.py",
    "heads_lightning/commands/hydra_application.py",
    "heads_lightning/__main__.py",
)
"""Files between the command line and a command: the frames of a failure begin after them."""
NO_PLACE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or choose another place"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a place that you may use"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG), "choose another path"),
}
"""What to do where a disk or its permissions, not this program, is at fault."""


def _report_failure(error: Exception, *, full: bool) -> None:
    """A failure that is nobody's typing mistake: one line where the machine's answer says all, else the frames of this program."""
    if isinstance(error, OSError) and error.errno in NO_PLACE and not full:
        place = "" if error.filename is None else f"{error.filename}: "
        _say(f"{place}{error.strerror}; {NO_PLACE[error.errno]}", error)
        return
    frames = tracebacks.extract_tb(error.__traceback__)
    last = max((i for i, frame in enumerate(frames) if any(file in frame.filename for file in ON_THE_WAY)), default=-1)
    if full:
        tracebacks.print_exc()
    else:
        lines = [*tracebacks.format_list(frames[last + 1 :]), *tracebacks.format_exception_only(error)]
        print("".join(lines).rstrip(), file=sys.stderr)
        print(f"{PROGRAM}: failed (HYDRA_FULL_ERROR=1 shows every frame)", file=sys.stderr)
