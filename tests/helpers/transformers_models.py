"""Small Hugging Face models, batches for them, and their attention written eagerly."""

import math

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
from recattn.integrations.transformers import BIAS, enable_sink_attention  # noqa: E402
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
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES),
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
}
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
# RMSNorm and the rotations of these compute in float32, whatever the model is in.
PRECISION = {name: 1e-12 if name in ENCODERS else 2e-5 for name in CONFIGS}


def model_of(name: str, auto: str = "AutoModel", dtype: torch.dtype = torch.float64) -> nn.Module:
    config = CONFIGS[name]()
    config.use_cache = False
    return getattr(transformers, auto).from_config(config, attn_implementation="sdpa").to(dtype).eval()


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


# --- The eager formulation, one sequence and one head at a time ---


class Eager:
    """An attention function for transformers that adds the bias to its scores and keeps the weights."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], layers: list[int]) -> None:
        self.batch, self.weights, self.hidden = batch, [], None
        attentions = find_attentions(model.base_model)
        self.chosen = {id(attentions[i]) for i in layers}
        self.hooks = [x.register_forward_pre_hook(self.keep_hidden, with_kwargs=True) for x in attentions]

    def keep_hidden(self, module, args, kwargs):
        self.hidden = args[0] if args else kwargs["hidden_states"]

    def bias(self, module, row: int) -> Tensor:
        """[N, N] of one sequence."""
        ids, mask = (self.batch[name][row] for name in ("input_ids", "attention_mask"))
        beta = torch.zeros(len(ids), len(ids), dtype=torch.float64)
        at = [i for i, token in enumerate(ids.tolist()) if token == SINK and mask[i]]
        if id(module) not in self.chosen or not at:
            return beta
        own = getattr(module, BIAS)
        x = own.norm(self.hidden[row, at])
        q, k = (projection(x).chunk(own.num_heads, dim=-1) for projection in (own.query_proj, own.key_proj))
        scores = torch.stack([a @ b.T / math.sqrt(a.shape[-1]) for a, b in zip(q, k, strict=True)])
        if module.is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        sinks = own.scale * scores.softmax(-1).mean(0)
        return beta.index_put(torch.meshgrid(torch.tensor(at), torch.tensor(at), indexing="ij"), sinks.double())

    def __call__(self, module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **_):
        assert dropout == 0
        groups = query.shape[1] // key.shape[1]
        i, j = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])
        visible = self.batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, query.shape[2], -1)
        if module.is_causal:
            visible = visible & (j <= i)
        if sliding_window is not None:
            visible = visible & ((i - j).abs() < sliding_window)
        biases = torch.stack([self.bias(module, row) for row in range(len(query))])[:, None]
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling + biases
        weights = scores.masked_fill(~visible, -1e30).softmax(-1).to(value.dtype)
        self.weights.append(weights)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), weights


def run_eager(model: nn.Module, batch: dict[str, Tensor], layers: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Run a model with its biases eagerly, without recattn's hooks and functions."""
    own = {module: dict(module._forward_pre_hooks) for module in model.modules()}
    for module in own:
        module._forward_pre_hooks.clear()
    eager = Eager(model, batch, layers)
    transformers.AttentionInterface.register("eager_with_sinks", eager)
    transformers.AttentionMaskInterface.register("eager_with_sinks", transformers.masking_utils.eager_mask)
    previous, model.config._attn_implementation = model.config._attn_implementation, "eager_with_sinks"
    out = hidden_of(model, batch)
    model.config._attn_implementation = previous
    for hook in eager.hooks:
        hook.remove()
    for module, hooks in own.items():
        module._forward_pre_hooks.update(hooks)
    return out, eager.weights
