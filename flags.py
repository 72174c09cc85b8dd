"""The command line: flags are the fields of a settings dataclass, and all are checked before the function runs.

A field says everything about its flag once: name, type, default, range or choices, a line of help, and whether a
resumed run may change it. Help, parsing, checks and the signature that Fire sees are derived from the fields. This
module imports nothing slow: `--help` and a wrong flag are answered at once.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import os
import sys
import textwrap
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

# ---------------------------------------------------------------------------------------------------------------------
# Errors, and what every command shows.


class UserError(ValueError):
    """A mistake of the user's, in one line: what was given, what is wanted, what to type instead."""

    everywhere = True  # every process of a machine meets it, so one is enough to say it
    code = 2


class RunError(UserError):
    """What ends a run that was asked for rightly: a loss that is not finite, a full disk."""

    code = 1


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def reading(what: str) -> Iterator[None]:
    """A loader of many formats raises whatever its format's library raises; a user gets one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: cannot be read ({first_line(error)})") from error


def progress(
    total: int | None,
    *,
    start: int = 0,
    shown: bool = True,
    unit: str = "step",
    named: str | None = None,
    delay: float = 0,
):
    """A progress bar, shown after `delay` seconds. One that goes to a file gets a line every half minute."""
    from tqdm.auto import tqdm

    often = 0.1 if sys.stderr.isatty() else 30
    about = dict(total=total, initial=start, disable=not shown, unit=unit, mininterval=often)
    return tqdm(**about, desc=named, delay=delay)


def nearest(word: str, names: Iterable[str]) -> str:
    """'; did you mean X?', or nothing where no name is near. An owner before a / and a tag after a . do not count."""
    known = list(names)
    bare = word.rpartition("/")[2]
    bare = bare if bare in known else bare.partition(".")[0] or bare
    close = difflib.get_close_matches(bare, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def one_of(flag: str, value, names) -> None:
    """Raise UserError unless `value` is one of `names`."""
    if value not in names:
        listed = ", ".join(names) if len(names) <= 20 else f"one of {len(names)} names"
        raise UserError(f"--{flag} {value}: want {listed}{nearest(str(value), names)}")


# ---------------------------------------------------------------------------------------------------------------------
# Settings: what a field says of its flag.


class Range(NamedTuple):
    wanted: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Range:
    return Range(f"{least} or more", lambda v: v >= least)


def interval(given: Any) -> tuple[float, float] | None:
    """(low, high) of "LOW,HIGH" or of two numbers; None for anything else. Whole numbers are int."""
    try:
        low, high = (float(word) for word in (given.split(",") if isinstance(given, str) else given))
    except (TypeError, ValueError):
        return None
    if not -math.inf < low < high < math.inf:
        return None
    return tuple(int(value) if value.is_integer() else value for value in (low, high))  # type: ignore[return-value]


def channels(given: Any) -> tuple[float, ...] | None:
    """(R, G, B) of "R,G,B" or of three numbers from 0 to 1; None for anything else."""
    try:
        found = tuple(float(word) for word in (given.split(",") if isinstance(given, str) else given))
    except (TypeError, ValueError):
        return None
    return found if len(found) == 3 and all(0 <= value <= 1 for value in found) else None


def one_or_two(given: Any) -> tuple[float, ...] | None:
    """The numbers of "0.1", "0.1,0.2", of a number or of a pair; None for anything else."""
    try:
        words = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int | float) else given
        found = tuple(float(word) for word in words)
    except (TypeError, ValueError):
        return None
    return found if len(found) in (1, 2) and all(map(math.isfinite, found)) else None


def in_both_views(wanted: str, high: float) -> Range:
    """A number from 0 to `high` for both views, or one for each."""

    def holds(v: Any) -> bool:
        found = one_or_two(v)
        return found is not None and all(0 <= value <= high for value in found)

    return Range(f"{wanted}, for both views, or one for each, as in 0.1,0.2", holds)


CHANNELS = Range(
    "imagenet, data, or three numbers from 0 to 1, as in 0.5,0.5,0.5",
    lambda v: v in ("imagenet", "data") or channels(v) is not None,
)
CHANNELS_ABOVE_0 = Range(CHANNELS.wanted, lambda v: CHANNELS.holds(v) and 0 not in (channels(v) or ()))
INTERVAL = Range("two numbers, the lower one first, as in 0,4095", lambda v: interval(v) is not None)
SHARE = Range("a share from 0 to 1", lambda v: 0 <= v <= 1)
SHARE_ABOVE_0 = Range("a share above 0, up to 1", lambda v: 0 < v <= 1)
ABOVE_0 = Range("a number above 0", lambda v: 0 < v < math.inf)
NOT_NEGATIVE = Range("0 or more", lambda v: 0 <= v < math.inf)
PRECISIONS = ("no", "fp16", "bf16")  # of Accelerate
SEED = Range("from 0 to 4294967295", lambda v: 0 <= v < 2**32)


def flag(
    default: Any,
    help: str,
    *,
    choices: Container | None = None,
    range: Range | None = None,
    on_resume: bool = False,
    heading: str = "",
) -> Any:
    """A field of a settings class. A default of None means that the user left it open.

    choices: read when the flag is checked, so a table may grow. on_resume: whether a resumed run may change it.
    heading: of the group of flags in the help that begins here.
    """
    about = {"help": help, "choices": choices, "range": range, "on_resume": on_resume, "heading": heading}
    return dataclasses.field(default=default, metadata=about)


class Settings:
    """The base of the settings classes: each is a frozen dataclass whose fields are made by `flag`."""

    def __post_init__(self) -> None:
        for field in flags_of(type(self)):
            value, about = getattr(self, field.name), field.metadata
            if value is None:
                continue
            if about["choices"] is not None:
                one_of(field.name, value, about["choices"])
            if about["range"] is not None and not about["range"].holds(value):
                raise UserError(f"--{field.name} {value}: want {about['range'].wanted}")


def flags_of(settings: type) -> list[dataclasses.Field]:
    """The fields that are flags, those of the class itself before those of the class that it extends."""
    own = {name: i for i, kind in enumerate(settings.__mro__) for name in vars(kind).get("__annotations__", ())}
    found = [field for field in dataclasses.fields(settings) if "help" in field.metadata]
    return sorted(found, key=lambda field: own[field.name])


def defaults_of(settings: type) -> dict[str, Any]:
    return {field.name: field.default for field in flags_of(settings)}


def kinds_of(settings: type) -> dict[str, tuple]:
    """The types that each flag takes: (int, NoneType) for `int | None`."""
    hints = get_type_hints(settings)
    return {f.name: get_args(hints[f.name]) or (hints[f.name],) for f in flags_of(settings)}


# ---------------------------------------------------------------------------------------------------------------------
# Words in, values out.


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def _parser(name: str, kinds: tuple) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
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


def check(settings: type, arguments: list[str]) -> dict[str, str]:
    """{flag: text} of the command line. Raise UserError for the first argument that `settings` cannot take."""
    kinds = kinds_of(settings)
    settled: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            more = f"; --{[*settled][-1]} takes one value, in quotes where it has spaces or *" if settled else ""
            raise UserError(
                f"{word!r}: every setting is a flag with a name, as in --method byol; --help lists them{more}"
            )
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
    return settled


def read_recipe(settings: type, path: str) -> dict[str, Any]:
    """The flags in a recipe, a YAML file of `name: value` lines. Raise UserError for a file or a key that is wrong."""
    import yaml

    said, kinds = f"--recipe {path}", kinds_of(settings)
    try:
        document = yaml.compose(Path(path).expanduser().read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{said}: cannot be read ({error.strerror}); recipes/ holds those of this project") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{said}: is no YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(document, yaml.MappingNode):
        raise UserError(f"{said}: want a flag and its value on each line, as in `method: byol`")
    found: dict[str, Any] = {}
    for key, value in document.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        where = f"{said}, line {key.start_mark.line + 1}: {name}"
        if name not in kinds or name == "recipe":
            raise UserError(f"{where}: no such flag{nearest(name, kinds) or ';'} --help lists them")
        if name in found:
            raise UserError(f"{where}: given twice")
        if not isinstance(value, yaml.ScalarNode) or "python" in value.tag or value.tag.startswith("!"):
            raise UserError(f"{where}: want one value")
        null = value.tag.endswith(":null")
        if null and NoneType not in kinds[name]:
            raise UserError(f"{where}: want a value after it")
        try:
            found[name] = None if null else _parser(name, kinds[name])(value.value)
        except UserError as error:
            raise UserError(f"{said}, line {key.start_mark.line + 1}: {str(error)[2:]}") from None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Commands.


class Given(NamedTuple):
    """What was given: flags that repeat a default are given too, as a resumed run may have another value."""

    typed: dict[str, Any]  # on the command line, or as arguments in Python
    recipe: dict[str, Any]  # by the recipe, where `typed` does not say otherwise


S = TypeVar("S", bound=Settings)


def read(settings: type[S], typed: dict[str, Any]) -> tuple[S, Given]:
    """The settings, and what of them was given. Raise UserError for a value out of its range."""
    recipe = {}
    if typed.get("recipe"):
        recipe = {k: v for k, v in read_recipe(settings, typed["recipe"]).items() if k not in typed}
    try:
        return settings(**recipe, **typed), Given(typed, recipe)
    except UserError as error:
        if any(str(error).startswith(f"--{name} ") for name in recipe):
            raise UserError(f"--recipe {typed['recipe']}: {str(error)[2:]}") from None
        raise


def said(s: Settings, given: Given) -> dict[str, Any]:
    """The flags that are not at their default, or were given although they are."""
    defaults, named = defaults_of(type(s)), given.typed | given.recipe
    return {k: v for k, v in vars(s).items() if v != defaults[k] or k in named}


def command(settings: type[S]) -> Callable[[Callable[[S, Given], Any]], Callable[..., Any]]:
    """Make function(settings, given) a command: called with flags as keyword arguments, in Python and by Fire."""

    def made(function: Callable[[S, Given], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(**typed: Any) -> Any:
            unknown = [name for name in typed if name not in kinds_of(settings)]
            if unknown:
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}")
            return function(*read(settings, typed))

        parameters = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in flags_of(settings)
        ]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        called.settings = settings  # type: ignore[attr-defined]
        return called

    return made


def help_text(settings: type, name: str) -> str:
    """What the command is for, and each flag with its line of help and its default."""
    lines = [f"usage: {name} [--flag value ...]", "", *inspect.cleandoc(settings.__doc__ or "").splitlines(), ""]
    for field in flags_of(settings):
        if field.metadata["heading"]:
            lines.append(field.metadata["heading"])
        value = "" if any(field.default is x for x in (None, False, "")) else f" ({field.default})"
        first, *more = textwrap.wrap(field.metadata["help"] + value, 86)
        lines += [f"  --{field.name:<17} {first}", *(" " * 22 + line for line in more)]
    return "\n".join(lines)


@contextmanager
def speaking(name: str) -> Iterator[None]:
    """A user's mistake is one line on stderr and the error's exit code; where all meet it, one line a machine."""
    try:
        yield
    except UserError as error:
        if "0" in (os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK")) or not error.everywhere:
            print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.code)


def answer(settings: type[S], name: str) -> None:
    """Answer --help and whatever is wrong with the flags alone, before a program imports what is slow."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(help_text(settings, name))
        sys.exit(0)
    with speaking(name):
        kinds = kinds_of(settings)
        read(settings, {flag: _parser(flag, kinds[flag])(text) for flag, text in check(settings, arguments).items()})


def launch(function: Callable[..., Any], name: str) -> None:
    """Run a command with the flags of the command line."""
    import fire
    from fire.decorators import SetParseFns

    settings = function.settings  # type: ignore[attr-defined]
    answer(settings, name)
    with speaking(name):
        parsers = {flag: _parser(flag, kinds) for flag, kinds in kinds_of(settings).items()}
        words = [f"--{flag}={text}" for flag, text in check(settings, sys.argv[1:]).items()]
        fire.Fire(SetParseFns(**parsers)(function), command=words, name=name, serialize=lambda result: None)
