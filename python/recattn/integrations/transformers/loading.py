"""Loading of models that were saved with sink attention."""

from torch import Tensor, nn

from recattn._check import expect
from recattn.integrations.transformers.architectures import is_bias_parameter
from recattn.integrations.transformers.enable import SinkAttentionHandle, enable_sink_attention


def from_pretrained(model_class: type, path: str, **kwargs: object) -> tuple[nn.Module, SinkAttentionHandle]:
    """`model_class.from_pretrained(path, **kwargs)` for a model saved with sink attention; returns it and its handle.

    transformers alone would drop the parameters of the bias and report them as unexpected weights.

    Raises:
        ValueError: the config has no sink settings, or the saved biases are not those of the layers it names.
    """
    model = model_class.from_pretrained(path, **kwargs)
    settings = getattr(model.config, "recattn_sink", None)
    expect(settings is not None, "path", "a model saved with sink attention", f"{path}, whose config has none")
    handle = enable_sink_attention(model, **settings)
    saved = _saved_biases(path, model.base_model_prefix, **kwargs)
    own = set(filter(is_bias_parameter, model.base_model.state_dict()))
    differing = sorted(own ^ saved.keys())
    expect(not differing, "path", "weights with just the biases of its config", f"{path}, which differs by {differing}")
    model.base_model.load_state_dict(saved, strict=False)
    return model, handle


def _saved_biases(path: str, prefix: str, **kwargs: object) -> dict[str, Tensor]:
    """The bias parameters in a checkpoint, named as in the base model."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    options = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
    hub = {name: kwargs[name] for name in options if name in kwargs}
    expect(kwargs.get("variant") is None, "variant", "None: sink attention is saved without one", kwargs.get("variant"))
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index:
        files, _ = get_checkpoint_shard_files(path, index, **hub)
    else:
        files = [cached_file(path, SAFE_WEIGHTS_NAME, **hub)]
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in filter(is_bias_parameter, tensors.keys()):
                found[name.removeprefix(f"{prefix}.")] = tensors.get_tensor(name)
    return found
