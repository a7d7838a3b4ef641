"""Replacement of modules in a built model, instance by instance, with undo."""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

from recattn._check import expect
from recattn.nn._projections import MultiheadProjections

Factory = Callable[[nn.Module, str], nn.Module | None]
Key = TypeVar("Key", bound="type[nn.Module] | str")


class _Replacement(NamedTuple):
    """`parent.<attribute>`, `name` in the model, was `old` and is now the module `new`; None: `old` was left."""

    name: str
    parent: nn.Module
    attribute: str
    old: nn.Module
    new: Any


def patch(model: nn.Module, replacements: Mapping[Key, Factory | type[nn.Module]]) -> PatchHandle:
    """Replace the submodules of `model` that are instances of a key, or called so, in place; classes are not changed.

        handle = recattn.patch(model, {nn.MultiheadAttention: partial(recattn.nn.RefinedSelfAttention, max_len=50)})
        handle = recattn.patch(model, {"layers.0.self_attn": recattn.nn.SinkAttention})

    A value is called as `value(old_module, qualified_name)` and returns the new module, or None to leave the old one.
    `recattn.nn.RefinedSelfAttention` and `recattn.nn.SinkAttention`, or a functools.partial of them with keywords,
    replace nn.MultiheadAttention: they take its sizes, dropout, device, dtype and mode, and share its parameters. Names
    in the state_dict stay the same, and an existing optimizer goes on training the shared parameters; only
    `handle.added_parameters` are new to it. RefinedSelfAttention does not replace the cross-attention of an
    nn.TransformerDecoderLayer; `handle.left` names the modules that were left.

    A name comes before a class, and the most derived class applies. A module used in several places is replaced by one
    new module in all of them; by a name, in that place alone.
    Submodules of a replaced module are not searched. Forward hooks of a replaced module do not move to the new one. An
    nn.TransformerEncoder that contains a replaced module no longer makes nested tensors. Your own replacement for
    `nn.TransformerEncoderLayer.self_attn` needs `_qkv_same_embed_dim = False`; otherwise the layer computes plain
    attention from its weights in inference, without calling it.

    Args:
        model: the model whose submodules are replaced; the model itself is not.
        replacements: maps a module class, or the name of a submodule as in `model.named_modules()`, to the factory of
            the new modules.

    Returns:
        A handle that undoes the replacement, also usable as a context manager.

    Raises:
        ValueError: nothing to replace, or no submodule of that name; a key or a result is no module; our classes meet
            an nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn. The model is then unchanged.
    """
    expect(isinstance(model, nn.Module), "model", "an nn.Module", type(model).__name__)
    _expect_keys(model, replacements)
    decoders = (module for module in model.modules() if isinstance(module, nn.TransformerDecoderLayer))
    cross_attentions = {getattr(decoder, "multihead_attn", None) for decoder in decoders}
    factories = {_place(model, key): _factory(value, cross_attentions) for key, value in replacements.items()}
    places = list(_replacements(model, "", factories, {}))
    made = [place for place in places if place.new is not None]
    left = [place.name for place in places if place.new is None]
    if not made:
        keys = " or ".join(key if isinstance(key, str) else key.__name__ for key in replacements)
        found = Counter(type(module).__name__ for module in model.modules() if module is not model)
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())) or "nothing"
        listed += f" (left: {', '.join(left)})" if left else ""
        raise ValueError(f"model must have a {keys} inside that is replaced, got a {type(model).__name__} of {listed}")
    reached = {place.name for place in places}
    inside = [key for key in replacements if isinstance(key, str) and key not in reached]
    expect(not inside, "replacements' keys", "names outside of replaced modules", inside)
    return PatchHandle(model, made, left)


def _expect_keys(model: nn.Module, replacements: Mapping[Key, object]) -> None:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for key in replacements:
        if isinstance(key, str):
            close = " or ".join(map(repr, difflib.get_close_matches(key, names)))
            hint = f" (did you mean {close}?)" if close else ""
            expect(key in names, "replacements' keys", "names of submodules of the model", f"{key!r}{hint}")
        else:
            of_module = isinstance(key, type) and issubclass(key, nn.Module)
            expect(of_module, "replacements' keys", "nn.Module classes or names of submodules", key)


class PatchHandle:
    """The result of `recattn.patch`. `restore`, or the end of a `with` block, undoes it.

    Attributes:
        replaced: names of the replaced submodules.
        left: names of submodules of a class to replace that were left: cross-attentions, if the new class does not
            support them, and modules for which a factory returned None.
    """

    def __init__(self, model: nn.Module, replacements: list[_Replacement], left: list[str]) -> None:
        self.replaced: list[str] = [replacement.name for replacement in replacements]
        self.left: list[str] = left
        self._olds = nn.ModuleList(dict.fromkeys(replacement.old for replacement in replacements))
        self._news = nn.ModuleList(dict.fromkeys(replacement.new for replacement in replacements))
        self._active = replacements
        pairs = dict.fromkeys((replacement.old, replacement.new) for replacement in replacements)
        self._shared = [places for old, new in pairs for places in _shared_parameters(old, new)]
        self._nested_encoders = list(_nesting_encoders(model, {replacement.parent for replacement in replacements}))
        for _, parent, attribute, _, new in replacements:
            setattr(parent, attribute, new)
        for encoder in self._nested_encoders:
            encoder.use_nested_tensor = False

    @property
    def added_parameters(self) -> list[nn.Parameter]:
        """Parameters of the new modules that the old ones did not have."""
        known = set(self._olds.parameters())
        return [parameter for parameter in self._news.parameters() if parameter not in known]

    def __repr__(self) -> str:
        return f"PatchHandle(replaced={self.replaced}, left={self.left})"

    def restore(self) -> None:
        """Put the old module objects back. Shared parameters keep their trained values. A second call does nothing.

        Raises:
            RuntimeError: a replaced submodule was replaced again since. The model is then unchanged.
        """
        for name, parent, attribute, _, new in self._active:
            if getattr(parent, attribute, None) is not new:
                raise RuntimeError(f"{name} was replaced again since: restore the later patch first")
        for (owner, name), (new_owner, new_name) in self._shared:
            # The new module may hold other Parameter objects by now, after loading with assign=True for example.
            owner.register_parameter(name, getattr(new_owner, new_name))
        for _, parent, attribute, old, new in self._active:
            setattr(parent, attribute, old.train(new.training))
        for encoder in self._nested_encoders:
            encoder.use_nested_tensor = True
        self._active, self._shared, self._nested_encoders = [], [], []

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def _factory(value: Factory | type[nn.Module], cross_attentions: set[nn.Module | None]) -> Factory:
    kind, options = value, {}
    if isinstance(value, functools.partial):
        kind, options = value.func, value.keywords
    if isinstance(kind, type) and issubclass(kind, MultiheadProjections):
        positional = getattr(value, "args", ())
        expect(not positional, f"options of {kind.__name__}", "keywords in functools.partial", positional)
        return functools.partial(_replace_multihead_attention, kind, options, cross_attentions)
    return value


def _replace_multihead_attention(
    kind: type[MultiheadProjections],
    options: Mapping[str, Any],
    cross_attentions: set[Any],
    old: Any,
    name: str,
) -> nn.Module | None:
    if old in cross_attentions and not kind.cross_attends:
        return None
    try:
        return kind.from_multihead_attention(old, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _place(model: nn.Module, key: Any) -> Any:
    """(parent, attribute) of a name, which is one place even if the parent has several names; a class as it is."""
    if not isinstance(key, str):
        return key
    prefix, _, attribute = key.rpartition(".")
    return model.get_submodule(prefix), attribute


def _replacements(
    parent: nn.Module,
    prefix: str,
    factories: Mapping[Any, Factory],
    made: dict[tuple[nn.Module, int], nn.Module | None],
) -> Iterator[_Replacement]:
    """Replacements for all modules below `parent` that have a factory; `made` caches what it made of an old module."""
    for attribute, old in parent._modules.items():  # named_children would skip repeated modules
        if old is None:
            continue
        name = prefix + attribute
        keys = ((parent, attribute), *type(old).__mro__)
        factory = next((factories[key] for key in keys if key in factories), None)
        new = None
        if factory is not None:
            cached = old, id(factory)
            if cached not in made:
                made[cached] = factory(old, name)
            new = made[cached]
            module = new is None or isinstance(new, nn.Module)
            expect(module, f"what replaces {name}", "an nn.Module or None", type(new).__name__)
            yield _Replacement(name, parent, attribute, old, new)
        if new is None:
            yield from _replacements(old, f"{name}.", factories, made)


def _shared_parameters(old: nn.Module, new: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]:
    """(module, name) in `old` and in `new` of each parameter that both have."""
    places = {parameter: place for place, parameter in _parameter_places(new)}
    for place, parameter in _parameter_places(old):
        if parameter in places:
            yield place, places[parameter]


def _parameter_places(module: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], nn.Parameter]]:
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            yield (owner, name), parameter


def _nesting_encoders(model: nn.Module, parents: set[nn.Module]) -> Iterator[nn.TransformerEncoder]:
    """Encoders that contain one of `parents` and would pass nested tensors to it in inference."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder):
            continue
        if module.use_nested_tensor and not parents.isdisjoint(module.modules()):
            yield module
