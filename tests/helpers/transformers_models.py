"""Small Hugging Face models, batches for them, and their attention written eagerly."""

import functools
import inspect
import math

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
from recattn.integrations.transformers import SinkAttentionHandle, enable_sink_attention  # noqa: E402
from recattn.integrations.transformers.architectures import find_attentions  # noqa: E402

SINK, VOCABULARY = 7, 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LAYER_TYPES = ["sliding_attention", "full_attention"]
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
    ),
    # Its first layer sees everything, its second a window of 9.
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=11),
    "mistral, wide window": lambda: transformers.MistralConfig(**GROUPED, sliding_window=4096),
    # A window of 11 in the first layer. The scale of the scores is not that of the head's size.
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, query_pre_attn_scalar=20, sliding_window=11, layer_types=LAYER_TYPES
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=11, layer_types=LAYER_TYPES
    ),
}
# The arguments of an attention that are masks: DistilBERT's, and ModernBERT's in local layers, up to 5.0.
MASKS = ("attention_mask", "mask", "sliding_window_mask")
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
DTYPE = "dtype" if VERSION >= (4, 56) else "torch_dtype"  # of from_pretrained
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert")
# The first versions of transformers that have these, or that recattn serves them in.
SINCE = {"qwen3": (4, 51), "gemma3": (5, 0), "gpt-oss": (4, 55)}
# RMSNorm and the rotations of these compute in float32, whatever the model is in.
PRECISION = {name: 1e-12 if name in ENCODERS else 2e-5 for name in CONFIGS}


def model_of(
    name: str, auto: str = "AutoModel", dtype: torch.dtype = torch.float64, attention: str = "sdpa", **options
) -> nn.Module:
    if SINCE.get(name, VERSION) > VERSION:
        pytest.skip(f"{name} needs transformers {SINCE[name]}")
    config = CONFIGS[name]()
    vars(config).update(options)
    if name == "gpt-oss":  # has no other attention, and no other experts in float64
        attention = config._experts_implementation = "eager"
    config.use_cache = False
    return getattr(transformers, auto).from_config(config, attn_implementation=attention).to(dtype).eval()


def batch_of(side: str = "right", length: int = 24) -> dict[str, Tensor]:
    """Three sequences, two of them padded. Sinks are unevenly placed: one is in the padding, the last row has one."""
    input_ids = torch.randint(10, VOCABULARY, (3, length))
    mask = torch.ones_like(input_ids)
    for row, padding in ((1, 5), (2, 11)):
        mask[row, slice(length - padding, None) if side == "right" else slice(0, padding)] = 0
    input_ids[0, [2, 7, 8, 20]] = SINK
    input_ids[1, [1, 6, 12, 18, 22]] = SINK
    input_ids[2, 11 if side == "left" else 12] = SINK
    return {"input_ids": input_ids, "attention_mask": mask}


def enabled(model: nn.Module, scale: float = 20.0, **options):
    """Enable sink attention with biases that are large and differ between layers."""
    handle = enable_sink_attention(model, **{"sink_token_id": SINK, **options})
    for bias in handle.biases.values():
        nn.init.normal_(bias.query_proj.weight)
        nn.init.normal_(bias.key_proj.bias)
        nn.init.normal_(bias.norm.bias)
        nn.init.constant_(bias.scale, scale)
    return handle


def hidden_of(model: nn.Module, batch: dict[str, Tensor], **kwargs) -> Tensor:
    """Hidden states at the valid tokens; transformers' values at padding do not matter."""
    return model(**batch, **kwargs)[0][batch["attention_mask"].bool()]


def set_attention(model: nn.Module, name: str) -> None:
    if hasattr(model, "set_attn_implementation"):  # from 4.54
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name


def static_cache(model: nn.Module, length: int) -> object:
    """A static cache for the sequences of `batch_of`. Early ones are made for a batch size and a dtype."""
    early = {"max_batch_size": 3, "dtype": model.dtype} if VERSION < (4, 56) else {}
    return transformers.StaticCache(model.config, max_cache_len=length, **early)


# --- The eager formulation ---


class BiasInMask:
    """Gives transformers' own attentions masks that hold the bias, made one sequence and one head at a time."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], biases: dict[int, nn.Module]) -> None:
        self.config, self.batch, self.biases = model.config, batch, biases
        self.hooks = [
            attention.register_forward_pre_hook(functools.partial(self.replace_mask, i), with_kwargs=True)
            for i, attention in enumerate(find_attentions(model.base_model))
        ]

    def bias(self, layer: int, hidden_states: Tensor, row: int) -> Tensor:
        """[N, N] of one sequence."""
        ids, mask = (self.batch[name][row] for name in ("input_ids", "attention_mask"))
        beta = torch.zeros(len(ids), len(ids), dtype=torch.float64)
        at = [i for i, token in enumerate(ids.tolist()) if token == SINK and mask[i]]
        if layer not in self.biases or not at:
            return beta
        own = self.biases[layer]
        x = own.norm(hidden_states[row, at])
        q, k = (projection(x).chunk(own.num_heads, dim=-1) for projection in (own.query_proj, own.key_proj))
        scores = torch.stack([a @ b.T / math.sqrt(a.shape[-1]) for a, b in zip(q, k, strict=True)])
        if self.config.model_type not in ENCODERS:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        sinks = own.scale * scores.softmax(-1).mean(0)
        return beta.index_put(torch.meshgrid(torch.tensor(at), torch.tensor(at), indexing="ij"), sinks.double())

    def visible(self, layer: int, length: int) -> Tensor:
        """[B, 1, N, N]"""
        i, j = torch.arange(length)[:, None], torch.arange(length)
        visible = self.batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, length, -1)
        if self.config.model_type not in ENCODERS:
            visible = visible & (j <= i)
        window = getattr(self.config, "sliding_window", None)
        if getattr(self.config, "layer_types", LAYER_TYPES[:1] * 2)[layer] == "full_attention":
            window = None
        if self.config.model_type == "modernbert":
            window = None if layer == 0 else self.config.local_attention // 2 + 1
        return visible if window is None else visible & ((i - j).abs() < window)

    def replace_mask(self, layer: int, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        arguments = dict(zip(inspect.signature(attention.forward).parameters, args, strict=False)) | kwargs
        hidden_states = arguments["query" if "query" in arguments else "hidden_states"]
        biases = torch.stack([self.bias(layer, hidden_states, row) for row in range(len(hidden_states))])[:, None]
        mask = biases.masked_fill(~self.visible(layer, hidden_states.shape[1]), -1e30)
        return (), arguments | {name: mask for name in MASKS if name in arguments}


def run_eager(
    model: nn.Module, batch: dict[str, Tensor], handle: SinkAttentionHandle, weights: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """What the model gives by transformers' own attention with the biases in its mask. The model is then restored."""
    biases = dict(handle.biases)
    handle.restore()
    eager = BiasInMask(model, batch, biases)
    if weights:
        model.config._attn_implementation = "eager"
    output = model(**batch, **({"output_attentions": True} if weights else {}))
    for hook in eager.hooks:
        hook.remove()
    return output[0][batch["attention_mask"].bool()], output.attentions
