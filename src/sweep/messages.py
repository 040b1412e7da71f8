"""A user's mistake becomes a line or two on the terminal: which key, what is allowed, what came. No traceback."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sweep import config
from sweep.config import RequestError, did_you_mean

USAGE_ERROR, INTERRUPTED = 2, 130
LAUNCHERS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}  # name: extra


def guard(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code, with wrong requests put into words on standard error.

    Anything that is not the user's mistake passes through with its traceback.
    """
    full_errors = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    try:
        command()
    except (RequestError, HydraException, OmegaConfBaseException) as error:
        if full_errors == "1":
            raise
        return complain(error)
    except KeyboardInterrupt:
        again = shlex.join(["python", "-m", "sweep", *sys.argv[1:]])
        print(f"\nsweep: interrupted; finished rows are kept. To go on from here: {again}", file=sys.stderr)
        return INTERRUPTED
    return 0


def complain(error: Exception) -> int:
    """Say on standard error what is wrong with the request, and return the exit code for it."""
    print(f"sweep: {explain(error)}", file=sys.stderr)
    return USAGE_ERROR


def explain(error: Exception) -> str:
    """The mistake behind an error of ours, of Hydra or of OmegaConf, in a line or two."""
    if isinstance(error, RequestError):
        return str(error)
    texts = [str(e) for e in _chain(error)]
    text = "\n".join(texts)
    if match := re.search(r"full_key: ([\w.]+)", text):
        key = match[1]
        if key.startswith("method.") and key in known_keys():
            return f"'{key}' is a key of a method, and the command chooses none: add +method=NAME"
        return f"unknown key '{key}'.{did_you_mean(key, known_keys())} All keys: python -m sweep --help"
    if match := re.search(r"Could not override '([^']+)'.\s*No match in the defaults list", text):
        word = next((word for word in sys.argv if word.startswith(f"{match[1]}=")), f"{match[1]}=NAME")
        return f"'{word}' needs a plus, since nothing is chosen by default: write +{word}"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"'{match[1]}' lists several values: add -m to sweep over them, or write [a,b] for one list"
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':((?:\s+\S+)*)", text):
        group, option, available = match[1], match[2], match[3].split("Config search path")[0].split()
        if group == "hydra/launcher" and option in LAUNCHERS:
            return f"{group}={option}: the package of this launcher is not installed. " \
                   f"Run: pip install 'sweep-pruning[{LAUNCHERS[option]}]'"  # fmt: skip
        return f"{group}={option}: there is no such option.{did_you_mean(option, available)} " \
               f"Allowed: {', '.join(available)}"  # fmt: skip
    return texts[0].strip()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def known_keys() -> list[str]:
    """Every key that can be set, as it is typed: `sparsity`, `benchmarks.limit`, `method.criterion`, …"""
    return [*_keys(config.Options, ""), *_keys(config.Cell, ""),
            *(key for family in config.FAMILIES.values() for key in _keys(family, "method."))]  # fmt: skip


def _keys(cls: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        for hint in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(hint) and hint not in config.FAMILIES.values():
                yield from _keys(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
