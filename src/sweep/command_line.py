"""The words of a command line: which keys there are, which were renamed, and what is wrong with words that cannot be read.

What Hydra and OmegaConf find wrong they say in words alone, which are no interface. Those that are read stand in `SAID`,
and tests/test_private.py says which of them a new release has changed; of other errors their own first lines are shown.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import traceback
import typing
from collections.abc import Iterator

from sweep import config
from sweep.pruning import families
from sweep.quantization import forms
from sweep.settings import RequestError, did_you_mean, flat_fields, renamed

SAID = {  # in the errors of Hydra and OmegaConf, by what they are about
    "a key": r"full_key: ([\w.]+)",
    "a group without a choice": r"Could not override '([^']+)'.\s*No match in the defaults list",
    "several values": r"Ambiguous value for argument '([^']+)'",
    "no option of a group": r"Could not find '([^']+)/([^'/]*)'\s+Available options in '[^']+':((?:\s+\S+)*)",
    "no name of an option": r"Config group override must be a string or a list",
}
_COMPOSERS = {"hydra", "omegaconf", "antlr4"}
LAUNCHERS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}  # name: extra


def explain(error: Exception) -> str | None:
    """The mistake behind an error of ours, of Hydra or of OmegaConf, in a line or two; None for another error.

    An error that Hydra or OmegaConf raise is of what was asked, whichever its type.
    """
    if not isinstance(error, RequestError) and not {_package(type(error).__module__), _raiser(error)} & _COMPOSERS:
        return None
    texts = [str(e) for e in _chain(error)]
    text = "\n".join(texts)
    missing = re.fullmatch(r"([\w.]+) is missing", texts[0])
    unknown = re.search(SAID["a key"], text)
    if (match := missing or unknown) and (word := _taking_away(match[1])):
        return f"'{word}' takes away {match[1]}, which the command needs: leave that word out"
    if isinstance(error, RequestError):
        return texts[0]
    from hydra.errors import OverrideParseException

    if unknown and "nterpolation" in texts[0]:
        return f"{unknown[1]}: {texts[0].splitlines()[0]}"
    if unknown:
        key = unknown[1]
        if key.startswith("method.") and key in known_keys():
            return f"'{key}' is a key of a method, and the command chooses none: add +method=NAME"
        return f"unknown key '{key}'.{did_you_mean(key, known_keys())} All keys: python -m sweep --help"
    if words := [e.override for e in _chain(error) if isinstance(e, OverrideParseException)]:
        return _unreadable(words[0])
    if match := re.search(SAID["a group without a choice"], text):
        word = next((word for word in sys.argv if word.startswith(f"{match[1]}=")), f"{match[1]}=NAME")
        return f"'{word}' needs a plus, since nothing is chosen by default: write +{word}"
    if match := re.search(SAID["several values"], text):
        return (
            f"'{match[1]}' lists several values: add -m to sweep over them, or write [a,b] for one list. A comma within "
            f"a name needs quotes: {_quoted(match[1])}"
        )
    if match := re.search(SAID["no option of a group"], text):
        group, option, available = match[1], match[2], match[3].split("Config search path")[0].split()
        if group == "quantize" and option not in forms.Names():
            return f"{group}={option}: there is no such form.{did_you_mean(option, forms.Names())} Allowed: {forms.Names()}"
        if group == "hydra/launcher" and option in LAUNCHERS:
            return (
                f"{group}={option}: the package of this launcher is not installed. "
                f"Run: pip install 'sweep-pruning[{LAUNCHERS[option]}]'"
            )
        return (
            f"{group}={option}: there is no such option.{did_you_mean(option, available)} "
            f"Allowed: {', '.join(available)}"
        )
    if re.search(SAID["no name of an option"], text):
        groups = {key.partition(".")[0] for key in known_keys() if "." in key}
        words = [
            word
            for word in sys.argv
            if word.partition("=")[0] in groups and re.search(r"=(null|true|false|[-\d.]+)$", word)
        ]
        return f"{' '.join(words)}: a group is chosen by the name of one of its options, which python -m sweep --help lists"
    said = texts[0].partition("Config search path")[0].strip()
    odd = _raiser(error) in _COMPOSERS and _package(type(error).__module__) not in _COMPOSERS
    return f"Hydra cannot read the command: {said}" if odd else said


def _raiser(error: Exception) -> str:
    """The package whose code raised an error, by itself or in the standard library."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((p for p in map(_package, reversed(frames)) if p not in sys.stdlib_module_names), "")


def _package(module: str) -> str:
    return module.partition(".")[0]


def _taking_away(key: str) -> str | None:
    """The word of the command line that deletes a key, such as ~benchmarks for benchmarks.limit."""
    words = {word[1:].partition("=")[0].replace("/", "."): word for word in sys.argv[1:] if word.startswith("~")}
    return next((word for name, word in words.items() if f"{key}.".startswith(f"{name}.")), None)


def _unreadable(word: str) -> str:
    """What to do about a word that is not of Hydra's grammar."""
    key, equals, _ = word.partition("=")
    if not equals:
        return f"'{word}' gives no value: write {key}=VALUE"
    if not re.fullmatch(r"[+~]*[\w./@:$-]+", key):
        return f"'{word}' cannot be read: {key!r} is no key"
    return (
        f"'{word}' cannot be read. A value with other characters than letters, digits and / - + . $ % * @ ? | needs quotes, "
        f"and quotes around them for the shell: {_quoted(word)}"
    )


def _quoted(word: str) -> str:
    """KEY=VALUE as it is typed in a shell when the value means its characters and nothing else."""
    from hydra.core.override_parser.types import Quote, QuotedString

    key, _, value = word.partition("=")
    return shlex.quote(f"{key}={QuotedString(text=value, quote=Quote.double).with_quotes()}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def known_keys() -> list[str]:
    """Every key that can be set, as it is typed: `sparsity`, `benchmarks.limit`, `method.criterion`, …"""
    return [
        *_keys(config.Options, ""),
        *_keys(config.Cell, ""),
        *(key for family in families.FAMILIES.values() for key in _keys(family, "method.")),
    ]


def under_present_names(words: list[str]) -> list[str]:
    """The words of a command with keys that were renamed under the names that they have now, each told."""
    now = {f"method.{was}": f"method.{name}" for f in families.FAMILIES.values() for was, name in renamed(f).items()}
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+~")
        if name in now:
            print(f"sweep: {name} is now called {now[name]}: use that", file=sys.stderr)
            word = f"{key.removesuffix(name)}{now[name]}{equals}{value}"
        found.append(word)
    return found


def _keys(cls: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in flat_fields(cls):
        yield prefix + field.name
        for hint in (hints.get(field.name), *typing.get_args(hints.get(field.name))):
            if dataclasses.is_dataclass(hint) and hint not in families.FAMILIES.values():
                yield from _keys(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
