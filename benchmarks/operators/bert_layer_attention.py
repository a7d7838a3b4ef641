"""A layer of BERT-base with sinks, from Hugging Face transformers: the cost of recattn in a whole model layer.

Limit: the unchanged layer, with SDPA and without a bias. Attention weights are dropped in training, as BERT's are, and
not in a forward without gradients.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from benchmarks.harness.goals import TimeGoal
from benchmarks.harness.registry import FORWARD, TRAINING, Cost, Inputs, register
from benchmarks.harness.workloads import BERT_LAYER, Draw, SinkWorkload
from benchmarks.operators.sink_attention import official_bias, random_positions

EPS = 1e-12  # of BERT's LayerNorms
BIAS_SCALE = 10.0  # the official code's initial value
ATTENTION, BIAS = "attention.self", "attention.self.sink_interaction"
WIDTHS = {  # rows and columns of each weight, in multiples of the hidden size
    f"{ATTENTION}.query": (1, 1),
    f"{ATTENTION}.key": (1, 1),
    f"{ATTENTION}.value": (1, 1),
    "attention.output.dense": (1, 1),
    "intermediate.dense": (4, 1),
    "output.dense": (1, 4),
    f"{BIAS}.query_proj": (1, 1),
    f"{BIAS}.key_proj": (1, 1),
}
NORMS = ("attention.output.LayerNorm", "output.LayerNorm", f"{BIAS}.norm")
PARAMETERS = (*(f"{m}.{p}" for m in (*WIDTHS, *NORMS) for p in ("weight", "bias")), f"{BIAS}.scale")
PLAIN_PARAMETERS = tuple(name for name in PARAMETERS if BIAS not in name)


def key_of(parameter: str) -> str:
    """The parameter's name as a keyword argument."""
    return parameter.replace(".", "__")


def draw_inputs(workload: SinkWorkload, draw: Draw) -> Inputs:
    size = workload.heads * workload.dim
    spots = [random_positions(workload.length, workload.sinks, draw) for _ in range(workload.batch)]
    inputs = {
        "hidden": draw.normal(workload.batch, workload.length, size),
        "sink_positions": draw.index(torch.stack(spots)),
        "heads": workload.heads,
        "dropout": workload.dropout_p,
    }
    for module, (rows, columns) in WIDTHS.items():
        inputs[key_of(f"{module}.weight")] = draw.normal(rows * size, columns * size, std=(columns * size) ** -0.5)
        inputs[key_of(f"{module}.bias")] = draw.normal(rows * size, std=0.1)
    for module in NORMS:
        inputs[key_of(f"{module}.weight")] = 1 + draw.normal(size, std=0.1)
        inputs[key_of(f"{module}.bias")] = draw.normal(size, std=0.1)
    inputs[key_of(f"{BIAS}.scale")] = torch.full_like(inputs["hidden"][0, 0, :1], BIAS_SCALE)
    return inputs


def cost(workload: SinkWorkload, inputs: Inputs, direction: str) -> Cost:
    """Twelve matmuls of hidden size squared, and attention. The backward has two matmuls for each of the forward."""
    hidden = inputs["hidden"]
    tokens, size = workload.batch * workload.length, hidden.shape[-1]
    weights = sum(inputs[key_of(name)].nbytes for name in PLAIN_PARAMETERS)
    flops = 24 * tokens * size**2 + 4 * tokens * workload.length * size
    forward = 2 * hidden.nbytes + weights
    return Cost(flops, forward) if direction == FORWARD else Cost(3 * flops, 3 * forward)


def dropout_of_call(dropout: float) -> float:
    """Of attention weights: `dropout` in training, none without gradients."""
    return dropout if torch.is_grad_enabled() else 0.0


def layer(hidden: Tensor, heads: int, dropout: float, parameters: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """BERT's equations as written, with all scores in memory."""

    def linear(module: str, x: Tensor) -> Tensor:
        return F.linear(x, parameters[f"{module}.weight"], parameters[f"{module}.bias"])

    def norm(module: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], parameters[f"{module}.weight"], parameters[f"{module}.bias"], EPS)

    q, k, v = (
        linear(f"{ATTENTION}.{name}", hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = (scores if bias is None else scores + bias).softmax(-1)
    attended = F.dropout(weights, dropout_of_call(dropout)) @ v
    attended = norm(NORMS[0], linear("attention.output.dense", attended.transpose(1, 2).flatten(2)) + hidden)
    return norm(NORMS[1], linear("output.dense", F.gelu(linear("intermediate.dense", attended))) + attended)


def by_name(inputs: Inputs, names: tuple[str, ...] = PARAMETERS) -> dict[str, Tensor]:
    return {name: inputs[key_of(name)] for name in names}


def official(hidden: Tensor, sink_positions: Tensor, heads: int, dropout: float, **inputs: Tensor) -> Tensor:
    """CTR-Sink's official formulation, with a dense bias."""
    parameters = by_name(inputs)
    sinks = hidden.gather(1, sink_positions[..., None].expand(-1, -1, hidden.shape[-1]))
    weight, offset = (parameters[f"{BIAS}.norm.{p}"] for p in ("weight", "bias"))
    sinks = F.layer_norm(sinks, sinks.shape[-1:], weight, offset)  # with PyTorch's default epsilon
    q, k = (
        F.linear(sinks, parameters[f"{BIAS}.{m}.weight"], parameters[f"{BIAS}.{m}.bias"])
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for m in ("query_proj", "key_proj")
    )
    between = F.dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), dropout_of_call(dropout))
    between = between.mean(1, keepdim=True)  # [B, 1, M, M]
    dense = official_bias(between, sink_positions, hidden.shape[1])
    return layer(hidden, heads, dropout, parameters, dense * parameters[f"{BIAS}.scale"])


def without_bias(hidden: Tensor, sink_positions: Tensor, heads: int, dropout: float, **inputs: Tensor) -> Tensor:
    return layer(hidden, heads, dropout, by_name(inputs, PLAIN_PARAMETERS), None)


EAGER, PLAIN = "official, eager", "transformers, SDPA, no bias"
BERT = register(
    "bert_layer",
    official,
    draw_inputs,
    cost,
    grads=("hidden", *map(key_of, PARAMETERS)),
    baseline=EAGER,
    workloads=BERT_LAYER,
    goals=tuple(
        TimeGoal(workload="bert_base", direction=direction, against=(PLAIN,), time_ratio=0.95)
        for direction in (FORWARD, TRAINING)
    ),
)
BERT.implementation(EAGER)(official)


@cache
def bert_layer(size: int, heads: int, dropout: float, with_sinks: bool) -> nn.Module:
    """A layer of transformers. Its parameters are replaced at each call."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1,
        hidden_size=size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=4 * size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=dropout,
    )
    model = BertModel(config, add_pooling_layer=False).train()
    if with_sinks:
        from recattn.integrations.transformers import enable_sink_attention

        enable_sink_attention(model, bias_scale=BIAS_SCALE)
    return model.encoder.layer[0]


def needs_transformers(workload: SinkWorkload, device: torch.device) -> str | None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "transformers is not installed"
    return None


@BERT.implementation("recattn", unsupported_reason=needs_transformers, ours=True)
def patched(hidden: Tensor, sink_positions: Tensor, heads: int, dropout: float, **inputs: Tensor) -> Tensor:
    from recattn.integrations.transformers import Sinks

    module = bert_layer(hidden.shape[-1], heads, dropout_of_call(dropout), with_sinks=True)
    sinks = Sinks(sink_positions, sink_positions >= 0, None, "right")
    return functional_call(module, by_name(inputs), (hidden,), {"sinks": sinks})


@BERT.implementation(
    PLAIN,
    unsupported_reason=needs_transformers,
    reference=without_bias,
    grads=("hidden", *map(key_of, PLAIN_PARAMETERS)),
)
def unpatched(hidden: Tensor, sink_positions: Tensor, heads: int, dropout: float, **inputs: Tensor) -> Tensor:
    module = bert_layer(hidden.shape[-1], heads, dropout_of_call(dropout), with_sinks=False)
    return functional_call(module, by_name(inputs, PLAIN_PARAMETERS), (hidden,))
