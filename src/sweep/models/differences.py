"""What a model is that its configuration does not build: found by comparing the two, told in plain data, made again.

Modules are compared by name: the plain values that they keep, such as head counts, sizes or the number of their layer,
what the configuration builds and the model has no more, and what stands in for it. Tensors take the shapes that are stored;
those that are not as built are told, so that a damaged file is known from a model that was cut.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sweep.formats import stand_in
from sweep.formats.packing import PackedLinear
from sweep.settings import RequestError

Facts = dict[str, Any]  # plain data, as JSON holds it; empty where the configuration says it all
_OURS = "sweep.models."  # where the classes of substitutes are
# What loading and training leave on modules, and what says nothing of what they compute.
_BESIDE = {
    "training",
    "name_or_path",
    "gradient_checkpointing",
    "hf_device_map",
    "hf_quantizer",
    "is_quantized",
    "quantization_method",
    "architectures",
    "transformers_version",
}
_MISSING = object()


class Substitute(nn.Module):
    """A module of sweep's own in the place of one that the configuration builds: made again by its class from `settings`.

    Its tensors are stored as any other's.
    """

    def settings(self) -> dict[str, Any]:
        """Plain arguments of the class."""
        return {}


def between(built: nn.Module, model: nn.Module) -> Facts:
    """What has to be done to `built`, which the model's configuration builds, so that it becomes `model`: see `make`.

    Changes `built`. Raises RequestError where no such facts can tell of the model.
    """
    facts: Facts = {}
    after = _modules(model)
    for name, left in after.items():  # from the outermost on, since what lies in a list is named by its numbers
        if isinstance(left, nn.ModuleList) and (numbers := _numbers(name, _modules(built).get(name), left)) is not None:
            facts.setdefault("lists", {})[name] = numbers
            make(built, {"lists": {name: numbers}})
    before = _modules(built)
    substitutes = {
        name: told
        for name, module in after.items()
        if isinstance(module, Substitute) and (told := _substitute(module)) != _substitute(before.get(name))
    }
    if substitutes:
        facts["substitutes"] = substitutes
        make(built, {"substitutes": substitutes})
    before = _modules(built)
    mixed = {
        name: mixin for name, module in after.items() if name in before and (mixin := _mixin(before[name], module))
    }
    if mixed:
        facts["mixed"] = mixed
        make(built, {"mixed": mixed})
    if added := _added(before, after):
        facts["added"] = added
        make(built, {"added": added})
    gone = [name for name in before if name not in after] + _gone_tensors(before, after)
    if absent := [name for name in gone if not any(name.startswith(f"{other}.") for other in gone)]:
        facts["absent"] = absent
        make(built, {"absent": absent})
        before = _modules(built)
    for name, module in after.items():
        if name in before and _kind(before[name]) != _kind(module) and not isinstance(module, PackedLinear):
            raise RequestError(
                f"{name} is a {type(module).__name__}, and the configuration builds a {type(before[name]).__name__}: "
                "no checkpoint can tell of it"
            )
    attributes = {
        name: changed
        for name, module in after.items()
        if name in before and (changed := _changed(before[name], module))
    }
    if attributes:
        facts["attributes"] = attributes
    configured = _configurations(before)
    configurations = {name: own for name, own in _configurations(after).items() if own != configured.get(name)}
    if configurations:
        facts["configurations"] = configurations
        make(built, {"configurations": configurations})
    return facts


def make(built: nn.Module, facts: Mapping[str, Any]) -> None:
    """Have a model that its configuration built become the one that the facts tell of, but for its tensors.

    lists        of a list of modules, the numbers of those that are left
    substitutes  by name, class and settings of what stands there instead
    mixed        by name, a class of sweep's that is mixed into the module's own
    added        by name, of what kind a tensor is that the module has beside its own: a parameter, a buffer, or a passing
                 one, which no state dict holds
    absent       names of modules and parameters that are not there
    attributes   of a module, the plain values that it keeps
    configurations  of a module that has one of its own, what it says otherwise than the model's
    """
    for name, numbers in facts.get("lists", {}).items():
        whole = built.get_submodule(name)
        built.set_submodule(name, nn.ModuleList(whole.get_submodule(str(number)) for number in numbers))
    for name, told in facts.get("substitutes", {}).items():
        built.set_submodule(name, _made(told))
    for name, mixin in facts.get("mixed", {}).items():
        module = built.get_submodule(name)
        kind = type(module)
        module.__class__ = type(kind.__name__, (_ours(mixin), kind), {"__module__": kind.__module__})
    for full, kind_of_tensor in facts.get("added", {}).items():
        path, _, name = full.rpartition(".")
        owner = built.get_submodule(path)
        if kind_of_tensor == "parameter":
            owner.register_parameter(name, nn.Parameter(torch.empty(0), requires_grad=False))
        else:
            owner.register_buffer(name, torch.empty(0), persistent=kind_of_tensor == "buffer")
    for full in facts.get("absent", ()):
        path, _, name = full.rpartition(".")
        owner = built.get_submodule(path)
        if isinstance(getattr(owner, name), nn.Parameter):
            owner.register_parameter(name, None)
        else:
            delattr(owner, name)
    for name, changed in facts.get("attributes", {}).items():
        module = built.get_submodule(name)
        for attribute, value in changed.items():
            setattr(module, attribute, _value(value))
    for name, changed in facts.get("configurations", {}).items():
        module = built.get_submodule(name)
        module.config = copy.deepcopy(module.config)
        for attribute, value in changed.items():
            setattr(module.config, attribute, _value(value))


def buffers(built: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that no state dict holds, and that the model has otherwise than its configuration builds them."""
    stored, before = model.state_dict().keys(), dict(built.named_buffers())
    return {
        name: tensor
        for name, tensor in model.named_buffers()
        if name not in stored and not same(before.get(name), tensor)
    }


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Give a model tensors by name, of whatever shapes and dtypes. Returns the names of those that it has no place for."""
    modules, state = _modules(model), model.state_dict().keys()
    unknown = []
    for full, tensor in tensors.items():
        path, _, name = full.rpartition(".")
        module = modules.get(path)
        held = _MISSING if module is None else getattr(module, name, _MISSING)
        if module is None or not (held is None or isinstance(held, Tensor)):
            unknown.append(full)
        elif isinstance(held, Tensor) and not isinstance(held, nn.Parameter):
            module.register_buffer(name, tensor, persistent=full in state)
        else:
            trains = tensor.is_floating_point() and (held is None or held.requires_grad)
            module.register_parameter(name, nn.Parameter(tensor, trains))
    return unknown


def shapes(built: nn.Module, model: nn.Module) -> dict[str, list[int]]:
    """The shapes of the tensors that have others than they are built with, by name."""
    were = {name: tensor.shape for name, tensor in built.state_dict().items()}
    return {
        name: list(tensor.shape)
        for name, tensor in model.state_dict().items()
        if tensor.shape != were.get(name, tensor.shape)
    }


def same(built: Tensor | None, held: Tensor) -> bool:
    """Whether a tensor is as it is built or read, rounded as it may have been since."""
    return built is not None and built.shape == held.shape and torch.equal(built.to(held.device, held.dtype), held)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _numbers(name: str, whole: nn.Module | None, left: nn.ModuleList) -> list[int] | None:
    """Of a list that has lost modules, the numbers of those that are left, ascending; None of any other."""
    if not isinstance(whole, nn.ModuleList) or len(whole) == len(left):
        return None
    numbers, next_ = [], 0
    for module in left:
        while next_ < len(whole) and not _alike(whole[next_], module):
            next_ += 1
        numbers.append(next_)
        next_ += 1
    if next_ > len(whole):
        raise RequestError(
            f"{name} has {len(left)} modules that do not follow each other so among the {len(whole)} that the "
            "configuration builds: no checkpoint can tell of them"
        )
    return numbers


def _alike(built: nn.Module, left: nn.Module) -> bool:
    """Whether what is left of a module can come of one that the configuration builds, by its class and its parts'."""
    if isinstance(left, Substitute | PackedLinear):
        return True
    if type(built) is not _kind(left)[-1]:
        return False
    children = dict(built.named_children())
    return all(
        name in children and _alike(children[name], child)
        for name, child in left.named_children()
        if not (isinstance(child, PackedLinear) or (name.isdigit() and stand_in.stacks(left)))
    )


def _gone_tensors(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> list[str]:
    """The names of parameters that the model has no more, but for those that packed layers hold."""
    gone = []
    for path, module in before.items():
        left = after.get(path)
        if left is None or isinstance(left, PackedLinear | Substitute):
            continue
        lost = dict(module.named_parameters(recurse=False)).keys() - dict(left.named_parameters(recurse=False)).keys()
        gone += [f"{path}.{name}" for name in sorted(lost - stand_in.stand_ins(left).keys())]
    return gone


def _changed(built: nn.Module, module: nn.Module) -> dict[str, Any]:
    """The plain values that a module keeps otherwise than it was built with."""
    return {} if isinstance(module, PackedLinear) else _otherwise(vars(built), vars(module))


def _configurations(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Of modules with a configuration of their own, the plain values that it says otherwise than the model's."""
    whole = [module.config for module in modules.values() if isinstance(module, PreTrainedModel)]
    found = {}
    for name, module in modules.items():
        own = getattr(module, "config", None)
        base = next((config for config in whole if type(config) is type(own)), None)
        if base is not None and own is not base and (changed := _otherwise(vars(base), vars(own))):
            found[name] = changed
    return found


def _otherwise(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: told
        for name, value in after.items()
        if not name.startswith("_")
        and name not in _BESIDE
        and (told := _told(value)) is not _MISSING
        and (name not in before or _text(_told(before[name])) != _text(told))
    }


def _told(value: Any) -> Any:
    """A plain value as JSON holds it, a tuple apart from a list; `_MISSING` for what is not plain."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_told(each) for each in value]
        if any(each is _MISSING for each in items):
            return _MISSING
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        pairs = [[key, _told(each)] for key, each in sorted(value.items(), key=str)]  # their order says nothing
        return _MISSING if any(each is _MISSING for _, each in pairs) else {"mapping": pairs}
    return _MISSING


def _value(told: Any) -> Any:
    """What `_told` was told of."""
    if isinstance(told, list):
        return [_value(each) for each in told]
    if isinstance(told, dict):
        if "tuple" in told:
            return tuple(_value(each) for each in told["tuple"])
        return {key: _value(each) for key, each in told["mapping"]}
    return told


def _text(told: Any) -> str:
    """For comparison. A configuration file makes lists of tuples, which say the same."""

    def listed(told: Any) -> Any:
        if isinstance(told, dict):
            return listed(told["tuple"]) if "tuple" in told else {"mapping": listed(told["mapping"])}
        return [listed(each) for each in told] if isinstance(told, list) else told

    return "" if told is _MISSING else json.dumps(listed(told))


def _kind(module: nn.Module) -> tuple[type, ...]:
    """The class of a module; of one that sweep has mixed a class into, which is made anew each time, the two."""
    kind = type(module)
    return kind.__bases__ if kind.__bases__[0].__module__.startswith(_OURS) and len(kind.__bases__) > 1 else (kind,)


def _mixin(built: nn.Module, module: nn.Module) -> str:
    """The name of the class of sweep's that is mixed into a module's own; empty where none is."""
    first, *rest = _kind(module)
    return _name(first) if rest and _kind(built) == (*rest,) else ""


def _added(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> dict[str, str]:
    """The names of tensors that the modules were not built with, and of what kind they are."""
    found = {}
    for path, module in after.items():
        built = before.get(path)
        if built is None or isinstance(module, PackedLinear | Substitute):
            continue
        own = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        state = module.state_dict().keys()
        for name in own:
            if not hasattr(built, name):
                kind = "parameter" if isinstance(own[name], nn.Parameter) else "buffer"
                found[f"{path}.{name}"] = kind if name in state else "passing"
    return found


def _substitute(module: nn.Module | None) -> dict[str, Any]:
    return {"class": _name(type(module)), "settings": module.settings()} if isinstance(module, Substitute) else {}


def _made(told: Mapping[str, Any]) -> Substitute:
    kind = _ours(told["class"])
    if not issubclass(kind, Substitute):
        raise RequestError(f"{told['class']} makes no module")
    return kind(**told["settings"])


def _name(kind: type) -> str:
    return f"{kind.__module__.removeprefix(_OURS)}.{kind.__qualname__}"


def _ours(name: str) -> Any:
    """Raises RequestError for what is no class of sweep's models."""
    place, _, kind = str(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(f"{_OURS}{place}"), kind)
    except (ImportError, AttributeError) as error:
        raise RequestError(f"the checkpoint has a module that this version of sweep does not know: {name}") from error
    if not (isinstance(found, type) and found.__module__ == f"{_OURS}{place}"):
        raise RequestError(f"the checkpoint has a module that is none of sweep's: {name}")
    return found
