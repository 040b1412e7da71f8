"""How settings are made from plain containers: frozen dataclasses whose keys, types and ranges are checked at the door.

What a field says of itself beside its type stands in its metadata, by `told` and `part`: its range or its legal names,
an older or a second name, and whether it is a part, a group whose settings are typed as if they were the holder's own.
Messages name the key, what is allowed, and what came.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
_BYTES = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}


class RequestError(ValueError):
    """A mistake in what the user asked for; shown as its message alone, without a traceback."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def byte_size(name: str, text: str) -> int:
    """`12GiB`, `800MB` or a number of bytes as bytes. Raises RequestError, which names `name`, for what is no size."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _BYTES:
        raise RequestError(f"{name} must be a size such as 12GiB, 800MB or a number of bytes; got {text!r}")
    return int(float(found[1]) * _BYTES[found[2].upper()])


# ---- what a field says of itself ----


def told(
    *,
    minimum: float | None = None,
    below: float | None = None,
    names: Collection[str] | None = None,
    alias: str | None = None,
    was: str | None = None,
) -> dict[str, Any]:
    """The metadata of a field with a range, legal names or another name.

    minimum, below  a number is at least the one, and less than the other
    names           what the text may be, where others declare that (a Literal otherwise); as a text, they are listed
    alias           a second name for the same key
    was             its name before it was renamed: accepted and told, and the name under which it is hashed
    """
    asked = {"minimum": minimum, "below": below, "names": names, "alias": alias, "was": was}
    return {name: value for name, value in asked.items() if value is not None}


def setting(default: Any, **asked: Any) -> Any:
    """A field with this default and the metadata of `told`."""
    return field(default=default, metadata=told(**asked))


def part(default: Any) -> Any:
    """A field that holds a group of settings whose keys are typed as if they were the holder's own."""
    return field(default=default, metadata={"part": True})


def flat_fields(cls: Any) -> Iterator[Field[Any]]:
    """The fields of settings as they are typed: those of parts in place of these."""
    hints = _hints(cls)
    for f in fields(cls):
        if f.metadata.get("part"):
            yield from flat_fields(hints[f.name])
        else:
            yield f


def renamed(cls: Any) -> dict[str, str]:
    """The older names of settings, each with the present one."""
    return {f.metadata["was"]: f.name for f in flat_fields(cls) if "was" in f.metadata}


class Named:
    """Settings whose names are among the declared ones however they are made: whoever dispatches on one need not ask."""

    def __post_init__(self) -> None:
        for name, allowed in choices(type(self)).items():  # type: ignore[arg-type]  # a class can be hashed
            value = getattr(self, name)
            if isinstance(value, str) and value not in allowed:
                raise RequestError(_not_among(name, value, allowed))


_hints = functools.cache(typing.get_type_hints)  # which takes longer than all else in building a cell


@functools.cache
def choices(cls: type) -> dict[str, Collection[str]]:
    """The names that each field may have; fields that may be any text are left out."""
    found: dict[str, Collection[str]] = {f.name: f.metadata["names"] for f in fields(cls) if "names" in f.metadata}
    for name, hint in _hints(cls).items():
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        allowed = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal]
        if allowed and str not in kinds:
            (found[name],) = allowed
    return found


def _not_among(where: str, value: Any, allowed: Collection[Any]) -> str:
    words = [str(choice) for choice in allowed]
    listed = ", ".join(words) if isinstance(allowed, tuple) else str(allowed)
    return f"{where} must be one of {listed}; got {value!r}.{did_you_mean(str(value), words)}"


# ---- settings as plain containers ----


def plain(settings: Any) -> dict[str, Any]:
    """Every setting, at any depth, as it is typed."""
    return _containers(settings, lambda f, value: True, lambda f: f.name)


def stated(settings: Any) -> dict[str, Any]:
    """The settings that are not at their declared default, at any depth, for hashing.

    So a setting that is added with a default that does what was always done renames no recorded row, and neither does a
    new name. A family names its group: without it, a neuron and a head at their defaults would be the same.
    """
    return _containers(
        settings,
        lambda f, value: f.name == "family" or f.default is MISSING or value != f.default,
        lambda f: f.metadata.get("was", f.name),
    )


def _containers(settings: Any, wanted: Any, name: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        if wanted(f, value):
            inner = _contained(value, wanted, name)
            found |= inner if f.metadata.get("part") else {name(f): inner}
    return found


def _contained(value: Any, wanted: Any, name: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_contained(item, wanted, name) for item in value)
    return _containers(value, wanted, name) if is_dataclass(value) else value


def build(cls: type[T], data: Mapping[str, Any], where: str, also: Iterable[str] = ()) -> T:
    """Settings from plain containers; every key, type and range is checked.

    where  the dotted path of `data`, for messages
    also   further keys that are legal beside these fields, for suggestions
    Raises RequestError.
    """
    known = {f.name: f for f in flat_fields(cls)}
    data = _by_present_names(data, known.values(), where)
    for key in data:
        if key not in known:
            legal = [*known, *also]
            raise RequestError(
                f"unknown key '{_full(where, key)}'.{did_you_mean(str(key), legal)} Allowed: {', '.join(legal)}"
            )
    return _build(cls, data, where)


def _build(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    hints, values = _hints(cls), {}  # type: ignore[arg-type]
    for f in fields(cls):  # type: ignore[arg-type]
        if f.metadata.get("part"):
            values[f.name] = _build(hints[f.name], data, where)
        elif f.name in data:
            full = _full(where, f.name)
            values[f.name] = _convert(data[f.name], hints[f.name], full)
            _check_range(values[f.name], f.metadata, full)
            if values[f.name] not in f.metadata.get("names", (values[f.name],)):
                raise RequestError(_not_among(full, values[f.name], f.metadata["names"]))
        elif f.default is MISSING and f.default_factory is MISSING:
            raise RequestError(f"{_full(where, f.name)} is missing")
    return cls(**values)


def _by_present_names(data: Mapping[str, Any], known: Iterable[Field[Any]], where: str) -> dict[str, Any]:
    """The data under the names that the fields have now."""
    found = dict(data)
    for f in known:
        alias, was = f.metadata.get("alias"), f.metadata.get("was")
        if alias in found:
            value = found.pop(alias)
            found.setdefault(f.name, value)  # conf/ already interpolates the alias into the name that counts
        if was in found:
            log.warning("%s is now called %s: use that", _full(where, was), _full(where, f.name))
            found[f.name] = found.pop(was)
    return found


def _full(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(value: Any, hint: Any, where: str) -> Any:
    if value == "???":
        raise RequestError(f"{where} is missing: set {where}=VALUE")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        hints = [a for a in args if a is not type(None)]
        if len(hints) > 1 and all(is_dataclass(a) for a in hints):
            return _convert(value, _of_family(value, hints, where), where)
        as_list = isinstance(value, list | tuple)
        (hint,) = hints if len(hints) == 1 else [a for a in hints if (typing.get_origin(a) is tuple) == as_list]
        return _convert(value, hint, where)
    if origin is Literal:
        if value not in args:
            raise RequestError(_not_among(where, value, args))
        return value
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise RequestError(f"{where} must be a group of settings, got {value!r}")
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise RequestError(f"{where} must be a list, such as [a,b]; got {value!r}")
        return tuple(_convert(item, args[0], where) for item in items)
    return _scalar(value, hint, where)


def _of_family(value: Any, kinds: Iterable[Any], where: str) -> Any:
    """The one of several groups that the data's `family` names."""
    by_name = {name: kind for kind in kinds for name in choices(kind)["family"]}
    family = value.get("family") if isinstance(value, Mapping) else value
    if family not in by_name:
        raise RequestError(
            f"{where}.family must be one of {', '.join(by_name)}, got {family!r}.{did_you_mean(str(family), by_name)}"
        )
    return by_name[family]


def _scalar(value: Any, hint: type, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float):
        return str(value)  # a folder may well be named 2026
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        noun = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[hint]
        raise RequestError(f"{where} must be {noun}, got {value!r}")
    return value


def _check_range(value: Any, limits: Mapping[str, Any], where: str) -> None:
    low, below = limits.get("minimum"), limits.get("below")
    if low is None or value is None:
        return
    if not (value >= low and (below is None or value < below)):  # written so that NaN is refused too
        allowed = f"at least {low:g}" if below is None else f"in [{low:g}, {below:g})"
        raise RequestError(f"{where} must be {allowed}, got {value}")
