"""Criteria from outside the package: what their source tells of them, without running it. No torch.

One is named as FILE.py:FUNCTION, or by an entry point of the group `sweep.criteria` that an installed package offers.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import runpy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sweep.settings import RequestError, did_you_mean

GROUP = "sweep.criteria"
Parameters = tuple[tuple[str, bool], ...]  # name, and whether it may be left out


@dataclass(frozen=True)
class Source:
    """A function and the file that holds it."""

    file: Path
    function: str
    parameters: Parameters
    fingerprint: str  # changes with the function's name and with whatever its file holds


def is_file(name: str) -> bool:
    """Whether a criterion is named by a file; FILE.py alone is, so that it is told what to add."""
    return name.rpartition(":")[0].endswith(".py") or name.endswith(".py")


@functools.cache
def offered() -> dict[str, metadata.EntryPoint]:
    """What installed packages offer, by name."""
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


def source(name: str) -> Source:
    """What the source says of a criterion named by a file or an entry point. Raises RequestError."""
    if is_file(name):
        file, _, function = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
        path = Path(file).expanduser()
        if not path.is_file():
            raise RequestError(f"method.criterion={name}: there is no file {file!r} in {Path.cwd()}")
        return _read(name, path, function)
    entry = offered()[name]
    return _read(name, _module_file(name, entry.module), entry.attr)


def load(name: str, found: Source) -> Callable[..., Any]:
    """The function itself; its file is run once in a process. Raises RequestError where it cannot be run, or has changed."""
    if not is_file(name):
        return offered()[name].load()
    return _run(name, found)


@functools.cache
def _run(name: str, found: Source) -> Callable[..., Any]:
    if source(name) != found:
        raise RequestError(f"method.criterion={name}: its file has changed since the cell began: run the command again")
    try:
        return runpy.run_path(str(found.file))[found.function]
    except Exception as error:
        raise RequestError(f"method.criterion={name}: its file cannot be run: {told(error, found.file)}") from error


def parameters(function: Callable[..., Any]) -> Parameters:
    """Of a function that is there."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(
        (str(p) if p.kind not in kinds else p.name, p.default is not p.empty)
        for p in inspect.signature(function).parameters.values()
    )


def told(error: BaseException, file: Path | str) -> str:
    """An exception in a line, with the line of this file that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if Path(frame.filename) == Path(file)]
    frame = (mine or list(frames))[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno}: {frame.line})"


def _read(name: str, file: Path, function: str) -> Source:
    content = file.read_bytes()
    known = _functions(name, content)
    if function not in known:
        listed = ", ".join(known) or "none"
        wrong = f"it has no function {function!r}" if function else "name one of its functions after a colon"
        raise RequestError(
            f"method.criterion={name}: {wrong}.{did_you_mean(function, known)} Functions there: {listed}"
        )
    digest = hashlib.sha256(function.encode() + b"\0" + content).hexdigest()[:16]
    return Source(file, function, known[function], digest)


@functools.lru_cache
def _functions(name: str, content: bytes) -> dict[str, Parameters]:
    """The parameters of the functions at the top level of a file."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        raise RequestError(f"method.criterion={name}: its file is no Python: {error}") from error
    return {node.name: _parameters(node.args) for node in tree.body if isinstance(node, ast.FunctionDef)}


def _parameters(arguments: ast.arguments) -> Parameters:
    """What cannot be passed by name is told with its mark, so that nothing goes by it."""
    plain, required = arguments.args, len(arguments.args) - len(arguments.defaults)
    return (
        *((f"{a.arg}, /", False) for a in arguments.posonlyargs),
        *((a.arg, place >= required) for place, a in enumerate(plain)),
        *((a.arg, value is not None) for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)),
        *((f"{mark}{a.arg}", False) for mark, a in (("*", arguments.vararg), ("**", arguments.kwarg)) if a is not None),
    )


def _module_file(name: str, module: str) -> Path:
    """The file of a module, found without importing it."""
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [Path(spec.origin or "")]
    if spec is not None and inner:
        places = [
            Path(folder, *inner[:-1], end)
            for folder in spec.submodule_search_locations or ()
            for end in (f"{inner[-1]}.py", f"{inner[-1]}/__init__.py")
        ]
    found = next((place for place in places if place.suffix == ".py" and place.is_file()), None)
    if found is None:
        raise RequestError(
            f"method.criterion={name} is offered by an installed package whose {module} has no source here"
        )
    return found
