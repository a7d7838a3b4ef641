"""Measure and plot how much attention a Hugging Face model pays to sink tokens (CTR-Sink, arXiv 2508.03668)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from recattn._check import expect, expect_choice, expect_index, expect_same_device, expect_shape
from recattn.functional.validation import checked_indices
from recattn.nn._masks import make_sink_mask, read_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class SinkMass(NamedTuple):
    """Attention to the sinks in float32 (float64 for a float64 model). Formulas: `sink_mass`."""

    to_sinks: Tensor  # [layers, B, H], mean over all tokens
    among_sinks: Tensor  # [layers, B, H], mean over the sinks; NaN in a row without sinks
    uniform_to_sinks: Tensor  # [layers, B], to_sinks if all visible keys had the same weight
    uniform_among_sinks: Tensor  # [layers, B], among_sinks if all visible keys had the same weight
    layers: tuple[int, ...]


def sink_mass(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    sink_positions: Tensor | None = None,
    sink_token_id: int | None = None,
    layers: Sequence[int] | None = None,
) -> SinkMass:
    """Share of attention that goes to the sinks, per layer, row and head:

        to_sinks    = mean over the tokens i of Σ_{j sink} p_ij        without padding
        among_sinks = mean over the sinks i of Σ_{j sink} p_ij

    and the same two values if p_ij were equal for all keys j that token i sees. Visible keys are found from the
    weights: key j is visible to i if the distance i - j lies between the smallest and the largest distance that gets
    weight in any head and row of the batch. This is right for causal masks and sliding windows, not for other masks.

    The model runs once in eval mode without gradients; its training modes are restored. If its attention is one of
    transformers' own that returns no weights (sdpa, flash, flex), eager attention replaces it for this call. Any other
    attention, such as recattn's, is kept and must return weights. The weights of all layers, [B, H, N, N] each, are in
    memory at the same time.

    Args:
        model: a transformers model that returns `attentions` [B, H, N, N].
        batch: arguments of its forward. Its `attention_mask` [B, N], if any, marks padding on either side.
        sink_positions: [B, M], padded with -1. Default: those in the batch. They are passed to the model unless its
            attention is transformers' own.
        sink_token_id: instead of sink_positions: tokens of `input_ids` with this id are the sinks.
        layers: layer numbers, from 0. Default: all.

    Raises:
        ValueError: there are no sinks, the model returns no attention weights, or an argument is wrong.
    """
    expect(hasattr(model, "set_attn_implementation"), "model", "a transformers model", type(model).__name__)
    batch = dict(batch)
    of_batch = batch.pop("sink_positions", None)
    of_model = of_batch if sink_positions is None else sink_positions
    if of_model is not None and not _is_of_transformers(_implementation(model)):
        batch["sink_positions"] = of_model
    if sink_token_id is None:
        sink_positions = of_model
    attentions = _attentions(model, batch)
    sizes: dict[str, int] = {}
    for layer, weights in enumerate(attentions):
        expect_shape(sizes, f"attentions[{layer}] of the model", weights, "B H N N")
    valid = _valid(batch, sizes)
    sinks = _sinks(batch, sizes, valid, sink_positions, sink_token_id)
    count = len(attentions)
    layers = tuple(range(count)) if layers is None else tuple(layers)
    for layer in layers:
        expect(0 <= layer < count, "layers", f"between 0 and {count - 1}", layer)
    expect(len(layers) > 0, "layers", "at least one", "none")
    masses = zip(*(_mass_of_layer(attentions[layer].to(valid.device), valid, sinks) for layer in layers), strict=True)
    to_sinks, among_sinks, uniform_to_sinks, uniform_among_sinks = map(torch.stack, masses)
    return SinkMass(to_sinks, among_sinks, uniform_to_sinks, uniform_among_sinks, layers)


def plot_sink_mass(
    before: SinkMass,
    after: SinkMass,
    *,
    quantity: Literal["to_sinks", "among_sinks"] = "to_sinks",
    labels: tuple[str, str] = ("before", "after"),
    ax: "Axes | None" = None,
    path: str | PathLike[str] | None = None,
) -> "Figure":
    """Plot the attention to the sinks by layer, before and after training.

    Lines are means over rows and heads, bands reach from the lowest to the highest head, and the dashed line is uniform
    attention. Shows the same quantity as Figure 3 of CTR-Sink (arXiv 2508.03668), in our own design.

    Args:
        before, after: results of `sink_mass` for the same layers and batch.
        quantity: "to_sinks" or "among_sinks".
        labels: names of the two in the legend.
        ax: matplotlib axes to draw into. Default: a new figure, which needs no display.
        path: file to save the figure to. Default: not saved.

    Raises:
        ValueError: before and after have different layers or batches.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plot_sink_mass needs matplotlib: pip install matplotlib") from error
    expect_choice("quantity", quantity, ("to_sinks", "among_sinks"))
    expect(before.layers == after.layers, "after", f"of the layers of before, {before.layers}", after.layers)
    uniform = getattr(before, f"uniform_{quantity}")
    other = getattr(after, f"uniform_{quantity}")
    same = uniform.shape == other.shape and torch.allclose(uniform.double(), other.double(), rtol=1e-3, equal_nan=True)
    expect(same, "after", "of the batch of before", "other sinks or visible keys")
    if ax is None:
        ax = Figure(figsize=(6, 4), layout="constrained").subplots()
    for mass, label in zip((before, after), labels, strict=True):
        by_head = _mean_of_rows(getattr(mass, quantity), ~uniform.isnan()).cpu()  # [layers, H]
        (line,) = ax.plot(mass.layers, by_head.mean(dim=1), marker="o", label=label)
        lowest, highest = by_head.aminmax(dim=1)
        ax.fill_between(mass.layers, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.plot(before.layers, uniform.nanmean(dim=1).cpu(), color="gray", linestyle="--", label="uniform attention")
    ax.set_xlabel("layer")
    ax.set_ylabel("attention to sinks" if quantity == "to_sinks" else "attention of sinks to sinks")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    figure = cast("Figure", ax.figure)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _attentions(model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """Attention weights of all layers, [B, H, N, N] each."""
    with _evaluating(model), _returning_weights(model), torch.no_grad():
        outputs = model(**batch, output_attentions=True, return_dict=True)
        used = _implementation(model)
    attentions = tuple(getattr(outputs, "attentions", None) or ())
    returned = sum(weights is not None for weights in attentions)
    expected = getattr(model.config, "num_hidden_layers", len(attentions))
    expect(
        returned == len(attentions) == expected and returned > 0,
        "model",
        f"one that returns the attention weights of all its {expected} layers with output_attentions=True",
        f"those of {returned} from {type(model).__name__} with {used!r} attention",
    )
    return attentions


def _implementation(model: Any) -> str:
    return model.config._attn_implementation


def _is_of_transformers(implementation: str) -> bool:
    return implementation in ("eager", "sdpa", "flex_attention") or implementation.startswith("flash_attention")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _returning_weights(model: Any) -> Iterator[None]:
    """Use eager attention instead of transformers' own other implementations, which return no weights."""
    own = _implementation(model)
    if own == "eager" or not _is_of_transformers(own):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _valid(batch: dict[str, Any], sizes: dict[str, int]) -> Tensor:
    """[B, N] bool, False at padding."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return read_mask(sizes, "attention_mask of the batch", mask, "B N")
    device = next(x.device for x in batch.values() if isinstance(x, Tensor))
    return torch.ones(sizes["B"], sizes["N"], dtype=torch.bool, device=device)


def _sinks(
    batch: dict[str, Any],
    sizes: dict[str, int],
    valid: Tensor,
    sink_positions: Tensor | None,
    sink_token_id: int | None,
) -> Tensor:
    """[B, N] bool, True at the sinks."""
    one = "given, or sink_token_id in its place (one of them)"
    expect((sink_positions is None) != (sink_token_id is None), "sink_positions", one, (sink_positions, sink_token_id))
    if sink_positions is not None:
        expect_index(sizes, "sink_positions", sink_positions, "B M")
        expect_same_device("the batch", valid, sink_positions=sink_positions)
        indices = checked_indices(valid.device, sink_positions=sink_positions, seq_len=sizes["N"])
        sinks = make_sink_mask(indices.sink_positions, sizes["N"]) & valid
    else:
        ids = batch.get("input_ids")
        expect(ids is not None, "input_ids", "in the batch, to find sink_token_id in", sorted(batch))
        sinks = (ids == sink_token_id) & valid
    name = "sink_positions" if sink_token_id is None else f"sink_token_id {sink_token_id}"
    expect(bool(sinks.any()), name, "somewhere in the batch, outside padding", "no sink")
    return sinks


def _mass_of_layer(weights: Tensor, valid: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first four fields of `SinkMass` for one layer."""
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    visible = _visible_pairs(weights, valid).to(weights.dtype)
    keys = sinks.to(weights.dtype)
    mass = weights.masked_fill(~sinks[:, None, None], 0).sum(dim=-1)
    uniform = torch.einsum("bij,bj->bi", visible, keys) / visible.sum(dim=-1)
    return (
        _mean_where(valid[:, None], mass),
        _mean_where(sinks[:, None], mass),
        _mean_where(valid, uniform),
        _mean_where(sinks, uniform),
    )


def _visible_pairs(weights: Tensor, valid: Tensor) -> Tensor:
    """[B, N, N] bool: True where the distance i − j lies between the smallest and the largest that get weight."""
    pairs = valid[:, :, None] & valid[:, None, :]
    position = torch.arange(valid.shape[1], device=valid.device)
    distance = position[:, None] - position
    seen = distance[(~(weights <= 0).all(dim=1) & pairs).any(dim=0)]  # NaN counts as a weight
    return pairs & (distance >= seen.min()) & (distance <= seen.max())


def _mean_of_rows(x: Tensor, counts: Tensor) -> Tensor:
    """Mean over the rows where `counts` [layers, B] is True: [layers, B, H] -> [layers, H]. NaN in them stays NaN."""
    return x.masked_fill(~counts[..., None], 0).sum(dim=1) / counts.sum(dim=1, keepdim=True)


def _mean_where(mask: Tensor, x: Tensor) -> Tensor:
    """Mean over the last axis of the entries where the mask is True."""
    return x.masked_fill(~mask, 0).sum(dim=-1) / mask.sum(dim=-1)
