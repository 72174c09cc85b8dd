"""The command line: flags are checked, all of them, before the function behind them runs.

Fire alone runs the function with its defaults first and complains of a misspelled flag afterwards.
"""

import difflib
import inspect
import os
import sys
from contextlib import contextmanager
from types import NoneType
from typing import get_args, get_type_hints

import fire
from fire.decorators import SetParseFns
from tqdm.auto import tqdm

given: set[str] = set()  # the flags on the command line; one that repeats a default is given too


class UserError(ValueError):
    """A mistake of the user's, in one line: what was given, what is wanted, what to type instead."""

    everywhere = True  # every process meets it, so one is enough to say it
    code = 2


class RunError(UserError):
    """What ends a run that was asked for rightly: a loss that is not finite, a full disk."""

    code = 1


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def reading(what: str):
    """A loader of many formats raises whatever its format's library raises; a user gets one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: cannot be read ({first_line(error)})") from error


def progress(total: int, *, start: int = 0, shown: bool = True, unit: str = "step") -> tqdm:
    """A progress bar; what goes to a file gets a line every half minute, not ten a second."""
    often = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=start, disable=not shown, unit=unit, mininterval=often)


def nearest(word: str, names) -> str:
    """'; did you mean X?', or nothing where no name is near."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def one_of(flag: str, value, names) -> None:
    """Raise UserError unless `value` is one of `names`."""
    if value not in names:
        listed = ", ".join(names) if len(names) <= 20 else f"one of {len(names)} names"
        raise UserError(f"--{flag} {value}: want {listed}{nearest(str(value), names)}")


def in_range(s: dict, ranges: dict) -> None:
    """Raise UserError for the first setting in `s` out of its range; `ranges` is {what is wanted: (test, names)}."""
    for wanted, (holds, names) in ranges.items():
        for name in names.split():
            if s.get(name) is not None and not holds(s[name]):
                raise UserError(f"--{name} {s[name]}: want {wanted}")


def _kinds(function):
    """The types that each parameter takes: (int, NoneType) for `int | None`."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(function).items() if name != "return"}


def _is_whole(text):
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def _parser(name, kinds):
    def parse(text):
        if bool in kinds and text in ("True", "true", "False", "false"):
            return text in ("True", "true")
        if NoneType in kinds and text in ("None", "none") and str not in kinds:
            return None
        for kind in (int, float, str):
            if kind in kinds:
                try:
                    return kind(text)
                except ValueError:
                    if kind is int and _is_whole(text):  # 1e5
                        return int(float(text))
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        raise UserError(f"--{name} {text}: want {' or '.join(wanted[k] for k in kinds if k in wanted)}")

    return parse


def check(function, arguments: list[str]) -> list[str]:
    """Raise UserError for the first argument that `function` cannot take; return them all as --name=value."""
    kinds = _kinds(function)
    settled, waiting = {}, list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r}: every setting is a flag with a name, as in --method byol; --help lists them")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in kinds and name.startswith("no") and bool in kinds.get(name[2:], ()):
            name, equals, text = name[2:], "=", "False"
        if name not in kinds:
            hint = nearest(name, kinds).replace("mean ", "mean --") or ";"
            raise UserError(f"--{name}: no such flag{hint} --help lists them")
        if name in settled:
            raise UserError(f"--{name}: given twice")
        if not equals:
            if waiting and not waiting[0].startswith("--"):
                text = waiting.pop(0)
            elif bool in kinds[name]:
                text = "True"
            else:
                raise UserError(f"--{name}: want a value after it")
        _parser(name, kinds[name])(text)
        settled[name] = text
    return [f"--{name}={text}" for name, text in settled.items()]


def help_text(function, name: str) -> str:
    """The docstring of `function` with each flag's default; its lines `    flag: text` are the flags."""
    defaults = {k: p.default for k, p in inspect.signature(function).parameters.items()}
    lines = [f"usage: {name} [--flag value ...]", ""]
    for line in inspect.cleandoc(function.__doc__).splitlines():
        flag, colon, text = line.strip().partition(": ")
        if line.startswith("  ") and colon and flag in defaults:
            value = "" if any(defaults[flag] is x for x in (None, False, "")) else f" ({defaults[flag]})"
            line = f"  --{flag:<17} {text}{value}"
        elif line.startswith("    "):
            line = " " * 22 + line.strip()
        lines.append(line)
    return "\n".join(lines)


def launch(function, name: str) -> None:
    """Run `function` with the flags of the command line. A user's mistake is one line and exit code 2."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(help_text(function, name))
        return
    try:
        arguments = check(function, arguments)
        parsers = {flag: _parser(flag, kinds) for flag, kinds in _kinds(function).items()}
        given.update(word[2:].partition("=")[0] for word in arguments)
        fire.Fire(SetParseFns(**parsers)(function), command=arguments, name=name, serialize=lambda result: None)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or not error.everywhere:
            print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.code)
    finally:
        given.clear()
