"""LREA and sink attention over TorchRec's JaggedTensors: the same numbers as the padded modules, and training."""

import importlib

import pytest
import torch
from torch import nn

from recattn.nn import LREA, SinkAttention

D, MAX_LEN, RANK = 8, 150, 3
LENGTHS = [5, 0, 64, 1, 130, 63, 65, 0]
EXACT = {"atol": 1e-11, "rtol": 1e-12}


@pytest.fixture(scope="module", autouse=True)
def ours():
    """Our module. Imported when the first test runs: TorchRec takes seconds. With another torch its library fails."""
    reason = "TorchRec is not installed: pip install --no-deps -r requirements/torchrec.txt"
    pytest.importorskip("torchrec", reason=reason, exc_type=(ImportError, OSError))
    return importlib.import_module("recattn.integrations.torchrec")


def jagged(lengths, width, index=torch.int64, **options):
    from torchrec import JaggedTensor

    values = torch.randn(sum(lengths), width, dtype=torch.float64, **options)
    return JaggedTensor(values, lengths=torch.tensor(lengths, dtype=index))


def padded(sequences):
    """[U, L, D], with NaN at padding."""
    pieces = sequences.values().split(sequences.lengths().tolist())
    return nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=torch.nan)


def packed(tokens, lengths):
    return torch.cat([row[:n] for row, n in zip(tokens, lengths, strict=True)])


def lrea(**options):
    torch.manual_seed(0)
    made = LREA(D, MAX_LEN, RANK, num_heads=2, dtype=torch.float64, **options)
    for weight in (made.w_comp, made.w_decomp):
        nn.init.normal_(weight)
    return made


def assert_same_gradients(actual, expected, leaves):
    incoming = torch.randn_like(actual)
    gradients = (torch.autograd.grad(x, leaves, incoming, allow_unused=True) for x in (actual, expected))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


# --- LREA ---


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("candidates", [None, [1] * 8, [3, 0, 2, 1, 0, 4, 1, 2]])
def test_lrea_is_that_of_padded_histories(ours, index, candidates):
    module, history = ours.JaggedLREA(lrea()), jagged(LENGTHS, D, index, requires_grad=True)
    behaviors, lengths = padded(history), history.lengths()
    if candidates is None:
        targets = torch.randn(8, D, dtype=torch.float64, requires_grad=True)
        actual, expected = module(targets, history), module.lrea(targets, behaviors, seq_lens=lengths)
        leaves = [targets]
    else:
        targets = jagged(candidates, D, index, requires_grad=True)
        out = module(targets, history)
        assert torch.equal(out.lengths(), targets.lengths()) and torch.equal(out.offsets(), targets.offsets())
        actual = out.values()
        expected = module.lrea(targets.values(), behaviors, targets.offsets(), seq_lens=lengths)
        leaves = [targets.values()]
    torch.testing.assert_close(actual, expected, **EXACT)
    assert_same_gradients(actual, expected, [*leaves, history.values(), *module.parameters()])
    with torch.no_grad():  # reads the values in place
        served = module(targets, history)
    torch.testing.assert_close(served if candidates is None else served.values(), expected, **EXACT)


def test_the_compressed_history_is_reused_and_regularized(ours):
    module, history = ours.JaggedLREA(lrea()), jagged(LENGTHS, D, requires_grad=True)
    targets = torch.randn(8, 2, D, dtype=torch.float64)
    compressed = module.compress(history)
    torch.testing.assert_close(compressed, module.lrea.compress(padded(history), history.lengths()), **EXACT)
    assert torch.equal(module(targets, history, compressed=compressed), module(targets, history))
    module.lrea.loss(compressed, "mean").backward()
    assert history.values().grad.abs().sum() > 0


def test_gradients_of_gradients(ours):
    module = ours.JaggedLREA(lrea(negative_slope=1.0))
    history = jagged([2, 0, 4], D, requires_grad=True)

    def compress(values):
        return module.compress(type(history)(values, offsets=history.offsets())).square()

    assert torch.autograd.gradgradcheck(compress, history.values())


def test_the_exported_state_serves(ours):
    module, history = ours.JaggedLREA(lrea(negative_slope=1.0)), jagged(LENGTHS, D)
    state = module.export_state(history)
    expected = module.lrea.export_state(padded(history), history.lengths())
    for mine, other in zip(state, expected, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    targets = torch.randn(8, D, dtype=torch.float64)
    torch.testing.assert_close(module.lrea.attend(targets, state), module(targets, history), **EXACT)


def test_no_user_and_no_behaviour(ours):
    module = ours.JaggedLREA(lrea())
    assert module.compress(jagged([], D, requires_grad=True)).shape == (0, RANK, D)
    for gradient in (False, True):
        out = module(torch.randn(2, D, dtype=torch.float64), jagged([0, 0], D, requires_grad=gradient))
        assert torch.equal(out, torch.zeros(2, D))


def test_lrea_refuses(ours):
    module = ours.JaggedLREA(lrea())
    targets = torch.randn(2, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="lengths of history must be at most max_len, 150, got 151"):
        module(targets, jagged([3, 151], D))
    with pytest.raises(ValueError, match="history must be a JaggedTensor, got Tensor"):
        module(targets, torch.randn(2, 3, D))
    with pytest.raises(ValueError, match=r"values of history must be \[T, embed_dim\] = \[4, 8\], got \[4, 7\]"):
        module(targets, jagged([3, 1], 7))
    with pytest.raises(ValueError, match=r"lrea must be a recattn\.nn\.LREA, got Linear"):
        ours.JaggedLREA(nn.Linear(2, 2))


# --- Sink attention ---


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_sink_attention_is_that_of_padded_sequences(ours, causal, sinks, heads):
    torch.manual_seed(0)
    module = ours.JaggedSinkAttention(SinkAttention(D, 4, num_kv_heads=heads, dtype=torch.float64))
    sequences = jagged(LENGTHS, D, requires_grad=True)
    leaves, options = [sequences.values(), *module.parameters()], {}
    if sinks:
        positions = torch.tensor([[1, 3, -1], [-1] * 3, [0, 5, 63], [0, -1, -1], [2, 64, 129], *[[-1] * 3] * 3])
        bias = torch.randn(8, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        leaves, options = [*leaves, bias], {"sink_positions": positions, "inter_sink_bias": bias}
    out = module(sequences, is_causal=causal, **options)
    assert torch.equal(out.lengths(), sequences.lengths()) and torch.equal(out.offsets(), sequences.offsets())
    tokens, lengths = padded(sequences), sequences.lengths()
    dense, _ = module.attention(tokens, tokens, tokens, seq_lens=lengths, is_causal=causal, **options)
    expected = packed(dense, lengths)
    torch.testing.assert_close(out.values(), expected, **EXACT)
    assert_same_gradients(out.values(), expected, leaves)


def test_it_loads_a_multihead_attention_and_drops_weights_in_training_only(ours):
    pytorch = nn.MultiheadAttention(D, 2, batch_first=True, dtype=torch.float64)
    own = SinkAttention.from_multihead_attention(pytorch, dropout=0.5)
    module, sequences = ours.JaggedSinkAttention(own), jagged([4, 4], D)
    tokens = padded(sequences)
    expected, _ = pytorch(tokens, tokens, tokens)
    assert not torch.allclose(module(sequences).values(), expected.flatten(0, 1))
    torch.testing.assert_close(module.eval()(sequences).values(), expected.flatten(0, 1), **EXACT)


def test_sink_attention_refuses(ours):
    module = ours.JaggedSinkAttention(SinkAttention(D, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="inter_sink_bias must be given with sink_positions"):
        module(jagged([3], D), sink_positions=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="sequences must be a JaggedTensor, got Tensor"):
        module(torch.randn(2, 3, D))
    with pytest.raises(ValueError, match="attention must be a SinkAttention, got MultiheadAttention"):
        ours.JaggedSinkAttention(nn.MultiheadAttention(D, 2))


# --- With an EmbeddingCollection ---

ITEMS = 30


class Ranker(nn.Module):
    def __init__(self, ours):
        from torchrec import EmbeddingCollection, EmbeddingConfig

        super().__init__()
        table = EmbeddingConfig(name="movies", embedding_dim=D, num_embeddings=ITEMS, feature_names=["history", "item"])
        self.embeddings = EmbeddingCollection(tables=[table], device=torch.device("cpu"))
        self.attention = ours.JaggedSinkAttention(SinkAttention(D, 2))
        self.lrea = ours.JaggedLREA(LREA(D, MAX_LEN, RANK))

    def forward(self, features):
        embeddings = self.embeddings(features)
        history = self.attention(embeddings["history"], is_causal=True)
        item = embeddings["item"].values()
        return (self.lrea(item, history) * item).sum(-1)


def test_a_ranker_trains_its_tables(ours):
    """A user likes an item if the history has items of its parity."""
    from torchrec import KeyedJaggedTensor

    torch.manual_seed(0)
    lengths = torch.randint(0, 12, (64,))
    parity = torch.randint(2, (64,))
    past = parity.repeat_interleave(lengths) + 2 * torch.randint(ITEMS // 2, (int(lengths.sum()),))
    item = torch.randint(ITEMS, (64,))
    liked = ((item % 2 == parity) & (lengths > 0)).float()
    both = torch.cat([lengths, torch.ones_like(lengths)])
    features = KeyedJaggedTensor(["history", "item"], torch.cat([past, item]), lengths=both)
    model = Ranker(ours)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(model(features), liked)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
