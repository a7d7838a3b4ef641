"""Loading of models that were saved with sink attention, by `from_pretrained` here and by transformers' own."""

import contextlib
import contextvars
import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from recattn._check import expect
from recattn.integrations.transformers.architectures import is_bias_parameter
from recattn.integrations.transformers.enable import SinkAttentionHandle, enable_by_settings, enable_sink_attention

_OPTIONS = tuple(inspect.signature(enable_sink_attention).parameters)[1:]

# The biases that `from_pretrained` here loads after transformers has loaded the rest; None in any other load.
_own_biases: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar("_own_biases", default=None)
_class_lock = threading.RLock()


def from_pretrained(model_class: Any, path: str, **kwargs: Any) -> tuple[nn.Module, SinkAttentionHandle]:
    """`model_class.from_pretrained(path, **kwargs)` for a model saved with sink attention; returns it and its handle.

    transformers alone drops the parameters of the bias. Its report of unexpected weights leaves out those that are
    loaded here, and nothing else.

    Args:
        model_class: a model class of transformers or an AutoModel class.
        path: a directory or a repository of the Hub, with weights in safetensors.
        kwargs: the options of `enable_sink_attention` (`sink_token_id`, `layers`, `bias_scale`, `dropout`, `max_sinks`,
            `padding_side`), each in the place of the saved one; all others go to `model_class.from_pretrained`. The
            saved biases fix `layers` and `bias_scale`: these may only repeat what was saved. `dropout` is that of the
            bias, also where the config of the model has an entry of this name.

    Raises:
        ValueError: the config has no sink settings, the saved biases are not those of the layers it names, or an option
            contradicts them.
    """
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    for name in ("variant", "output_loading_info"):
        expect(not kwargs.get(name), name, "left out", kwargs.get(name))
    saved = _read_biases(path, **kwargs)
    loading = _own_biases.set(tuple(saved))
    try:
        model = model_class.from_pretrained(path, **kwargs)
    finally:
        _own_biases.reset(loading)
    settings = getattr(model.config, "recattn_sink", None)
    if settings is None:
        raise ValueError(f"path must be a model saved with sink attention, got {path}, whose config has none")
    del model.config.recattn_sink  # so that restore() leaves a config without a bias
    handle = enable_by_settings(model, {**settings, **options})
    try:
        _expect_same_biases(path, settings, handle.settings)
        prefix = f"{model.base_model_prefix}."
        state = {name.removeprefix(prefix): value for name, value in saved.items()}
        own = set(filter(is_bias_parameter, model.base_model.state_dict()))
        differing = sorted(own ^ state.keys())
        fits = "weights with just the biases of its config"
        expect(not differing, "path", fits, f"{path}, which differs by {differing}")
    except ValueError:
        handle.restore()
        raise
    model.base_model.load_state_dict(state, strict=False)
    return model, handle


def _expect_same_biases(path: str, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    for name in ("layers", "bias_scale"):
        expect(settings[name] == saved[name], name, f"{saved[name]}, as of the biases in {path}", settings[name])


def _read_biases(path: str, **kwargs: Any) -> dict[str, Tensor]:
    """The bias parameters in the safetensors files of a checkpoint, by their names there."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    options = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
    hub = {name: kwargs[name] for name in options if name in kwargs}
    find = functools.partial(cached_file, path, _raise_exceptions_for_missing_entries=False, **hub)
    index, single = find(SAFE_WEIGHTS_INDEX_NAME), find(SAFE_WEIGHTS_NAME)
    files = get_checkpoint_shard_files(path, index, **hub)[0] if index else [single] if single else []
    found = {}
    for file in files or ():
        with safe_open(file, framework="pt") as tensors:
            for name in filter(is_bias_parameter, tensors.keys()):
                found[name] = tensors.get_tensor(name)
    return found


@contextlib.contextmanager
def _expecting(model_class: type[PreTrainedModel], names: tuple[str, ...]) -> Iterator[None]:
    """transformers does not report these parameters of a checkpoint as unexpected weights of the class."""
    ignored = "_keys_to_ignore_on_load_unexpected"
    with _class_lock:
        inherited, own = getattr(model_class, ignored) or (), vars(model_class).get(ignored, ...)
        # transformers may add the prefix of the base model to a name, or take it away.
        in_base = [name.removeprefix(f"{model_class.base_model_prefix}.") for name in names]
        setattr(model_class, ignored, [*inherited, *(rf"(^|\.){re.escape(name)}$" for name in in_base)])
        try:
            yield
        finally:
            delattr(model_class, ignored) if own is ... else setattr(model_class, ignored, own)


def _warn_of_lost_biases(load: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel.from_pretrained` that warns where it leaves out a bias, and then takes it from the config."""

    @functools.wraps(load)
    def load_model(model_class: type[PreTrainedModel], path: Any, *args: Any, **kwargs: Any) -> Any:
        own = _own_biases.get()
        if own is not None:
            with _expecting(model_class, own):
                return load(model_class, path, *args, **kwargs)
        loaded = load(model_class, path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        has_biases = any(is_bias_parameter(name) for name, _ in model.named_parameters())
        if getattr(model.config, "recattn_sink", None) is not None and not has_biases:
            del model.config.recattn_sink  # a later save_pretrained would claim a bias
            warnings.warn(
                f"{path} was saved with sink attention, whose bias is not loaded: use "
                "recattn.integrations.transformers.from_pretrained",
                stacklevel=2,
            )
        return loaded

    return load_model


_load_model = _warn_of_lost_biases(vars(PreTrainedModel)["from_pretrained"].__func__)
PreTrainedModel.from_pretrained = classmethod(_load_model)  # pyright: ignore[reportAttributeAccessIssue]
