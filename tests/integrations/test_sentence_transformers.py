"""Sink attention in a SentenceTransformer: encode, train, save and load."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

from recattn.integrations.transformers import BIAS, from_pretrained  # noqa: E402
from tests.helpers.transformers_models import SINK, VOCABULARY, enabled, model_of  # noqa: E402

TEXTS = ["w9 w10 [SINK] w11 w12 [SINK] w13 [SINK]", "w20 [SINK] w21 [SINK]"]


@pytest.fixture
def sentences(tmp_path):
    """A SentenceTransformer of a small BERT with random weights, with mean pooling."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "w5", "w6", "[SINK]"]
    words += [f"w{i}" for i in range(8, VOCABULARY)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[SINK]"]})
    assert tokenizer.convert_tokens_to_ids("[SINK]") == SINK
    tokenizer.save_pretrained(tmp_path)
    model_of("bert", dtype=torch.float32).save_pretrained(tmp_path)
    return SentenceTransformer(modules=[Transformer(str(tmp_path), max_seq_length=32), Pooling(32, "mean")])


def encode(sentences: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    return sentences.encode(texts, convert_to_tensor=True, device="cpu")


def test_encodes_with_padding_and_restores(sentences):
    plain = encode(sentences, TEXTS)
    handle = enabled(sentences[0].model)
    padded, alone = encode(sentences, TEXTS), torch.cat([encode(sentences, [text]) for text in TEXTS])
    assert (padded - plain).abs().max() > 1e-3
    assert (padded - alone).abs().max() <= 1e-6
    handle.restore()
    assert torch.equal(encode(sentences, TEXTS), plain)


def test_a_step_of_its_loss_trains_the_bias(sentences):
    biases = enabled(sentences[0].model).biases
    loss = CosineSimilarityLoss(sentences.train())
    optimizer = torch.optim.Adam(sentences.parameters())
    # Two lists of texts: the loss compares their embeddings pair by pair.
    pairs = [sentences.preprocess(texts) for texts in (TEXTS, TEXTS[::-1])]
    before = [bias.scale.item() for bias in biases.values()]
    value = loss(pairs, torch.tensor([1.0, 0.0]))
    value.backward()
    optimizer.step()
    assert all(p.grad.abs().max() > 0 for bias in biases.values() for n, p in bias.named_parameters() if n == "scale")
    assert [bias.scale.item() for bias in biases.values()] != before


def test_saves_and_loads(sentences, tmp_path):
    handle = enabled(sentences[0].model)
    expected = encode(sentences, TEXTS)
    sentences.save_pretrained(str(tmp_path / "saved"))
    with pytest.warns(UserWarning, match="whose bias is not loaded"):
        loaded = SentenceTransformer(str(tmp_path / "saved"))
    assert not any(BIAS in name for name in loaded.state_dict())
    loaded[0].model, again = from_pretrained(transformers.AutoModel, str(tmp_path / "saved"))
    assert again.settings == handle.settings
    assert torch.equal(encode(loaded, TEXTS), expected)
