"""Each message that docs/troubleshooting.md quotes is one that recattn gives today."""

import functools
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import redis
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from triton.runtime.errors import OutOfResources

import recattn
from recattn import _dispatch, _extension, _versions
from recattn._imports import importing
from recattn.integrations.transformers import enable_sink_attention
from recattn.integrations.transformers.generations import find_generation
from recattn.ops import _fallback, _support
from recattn.ops.sink_attention import cpu as sink_attention_cpu

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
QUOTES = re.compile(r"^```\n(\w*(?:Error|Warning): .*?)\n```$", flags=re.DOTALL | re.MULTILINE)

PROVOKED: list[Callable[[pytest.MonkeyPatch], object]] = []


def provoked(call: Callable[[pytest.MonkeyPatch], object]) -> Callable[[pytest.MonkeyPatch], object]:
    PROVOKED.append(call)
    return call


def sink_inputs(dtype: torch.dtype = torch.float32, length: int = 8) -> dict[str, torch.Tensor]:
    q = torch.ones(2, 4, length, 16, dtype=dtype)
    sinks = torch.tensor([[2, 5], [3, -1]])
    return {"q": q, "k": q, "v": q, "sink_positions": sinks, "inter_sink_bias": torch.zeros(2, 1, 2, 2)}


def call_sink_attention(**changes: object) -> object:
    return recattn.sink_attention(**{**sink_inputs(), **changes})


def state_table(**options: object) -> recattn.serving.StateTable:
    return recattn.serving.StateTable(2, heads=1, rank=2, dim=4, **options)


# --- Installation ---


@provoked
def old_torch(_):
    raise ImportError(_versions.unsupported_reason("torch", "2.9.1"))


@provoked
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    _support.installation_unsupported_reason.cache_clear()
    try:
        call_sink_attention(impl="triton")
    finally:
        _support.installation_unsupported_reason.cache_clear()


@provoked
def old_assembler(monkeypatch):
    from triton import knobs

    from recattn.triton_kernels.common import assembler

    tool = knobs.NvidiaTool("/usr/local/cuda/bin/ptxas", "12.8")
    monkeypatch.setattr(assembler, "_tools", lambda: [tool])
    assembler.path.__wrapped__()


def missing_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as context:
        context.setattr(_extension, "MISSING", {})
        context.setattr(Path, "glob", lambda *_: iter(()))
        _extension._load("_C", "cpu")
        return _extension.MISSING["cpu"]


@provoked
def without_compiled_kernels(monkeypatch):
    monkeypatch.setitem(_extension.MISSING, "cpu", missing_kernels(monkeypatch))
    call_sink_attention(impl="cpu")


@provoked
def slower_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(_dispatch, "_has_warned", False)
    monkeypatch.setitem(_extension.MISSING, "cpu", missing_kernels(monkeypatch))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        call_sink_attention()


# --- Choosing an implementation ---


@provoked
def triton_on_a_cpu(monkeypatch):
    monkeypatch.setattr(_support, "_triton_runtime", lambda: SimpleNamespace(interpret=False))
    call_sink_attention(impl="triton")


@provoked
def correction_on_a_cpu(_):
    call_sink_attention(impl="correction")


@provoked
def float64_in_a_kernel(_):
    call_sink_attention(**sink_inputs(torch.float64), impl="cpu")


@provoked
def unknown_implementation(_):
    call_sink_attention(impl="flash")


@provoked
def implementation_of_another_operator(_):
    call_sink_attention(impl="chunked")


def fail_to_launch(*_, **__):
    raise OutOfResources(229376, 101376, "shared memory")


def falling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECATTN_FALLBACK", "reference")
    monkeypatch.setattr(_fallback, "_failed", set())
    monkeypatch.setattr(_fallback, "_reported", set())


@provoked
def kernel_that_fails(monkeypatch):
    falling_back(monkeypatch)
    monkeypatch.setattr(sink_attention_cpu, "sink_attention_fwd", fail_to_launch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        call_sink_attention()


@provoked
def backward_that_fails_after_dropout(monkeypatch):
    falling_back(monkeypatch)
    q = torch.ones(2, 4, 8, 16, requires_grad=True)
    out = call_sink_attention(q=q, dropout_p=0.1)
    monkeypatch.setattr(sink_attention_cpu, "sink_attention_bwd", fail_to_launch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        out.sum().backward()


# --- Shapes, dtypes, devices ---


@provoked
def tokens_before_heads(_):
    inputs = sink_inputs()
    call_sink_attention(k=inputs["k"].transpose(1, 2))


@provoked
def half_precision_of_one(_):
    call_sink_attention(k=torch.ones(2, 4, 8, 16, dtype=torch.bfloat16))


@provoked
def heads_that_do_not_divide(_):
    call_sink_attention(k=torch.ones(2, 3, 8, 16), v=torch.ones(2, 3, 8, 16))


@provoked
def devices(_):
    call_sink_attention(inter_sink_bias=torch.zeros(2, 1, 2, 2, device="meta"))


@provoked
def nested(_):
    call_sink_attention(q=torch.nested.nested_tensor([torch.ones(3, 4, 16)], layout=torch.jagged))


@provoked
def scale_as_a_parameter(_):
    call_sink_attention(scale=torch.tensor(1.0, requires_grad=True))


# --- Positions, lengths, offsets ---


@provoked
def sinks_out_of_order(_):
    call_sink_attention(sink_positions=torch.tensor([[5, 2], [3, -1]]))


@provoked
def sinks_out_of_range(_):
    call_sink_attention(sink_positions=torch.tensor([[2, 8], [3, -1]]))


@provoked
def lengths_out_of_range(_):
    call_sink_attention(seq_lens=torch.tensor([8, 9]))


@provoked
def offsets_of_other_targets(_):
    keys = torch.ones(2, 1, 2, 4)
    recattn.lrea_attention(torch.ones(5, 1, 4), keys, keys, torch.ones(2, 6), torch.tensor([0, 2, 6]))


@provoked
def slot_out_of_range(_):
    keys = torch.ones(2, 1, 2, 4)
    recattn.lrea_absorbed_attention(torch.ones(1, 1, 4), keys, keys, torch.tensor([2]), torch.tensor([0, 1]))


@provoked
def too_few_rows_of_w_q(_):
    q = torch.ones(1, 1, 60, 8)
    recattn.refined_attention(q, q, q, torch.ones(50, 4), torch.ones(50, 4))


# --- Modules and patch ---


@provoked
def padding_between_tokens(_):
    attention = recattn.nn.SinkAttention(8, 2)
    x = torch.ones(1, 4, 8)
    attention(x, x, x, key_padding_mask=torch.tensor([[False, True, False, False]]))


@provoked
def mask_that_is_not_causal(_):
    attention = recattn.nn.SinkAttention(8, 2)
    x = torch.ones(1, 4, 8)
    attention(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.bool))


@provoked
def dropout_in_third_place(_):
    recattn.nn.RefinedSelfAttention(32, 1, 0.2)


@provoked
def lengths_without_a_side(_):
    attention = recattn.nn.RefinedSelfAttention(8, 2, max_len=4)
    x = torch.ones(1, 4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        attention(x, x, x, seq_lens=torch.tensor([3]))


@provoked
def nothing_to_patch(_):
    recattn.patch(nn.Sequential(nn.Linear(2, 2)), {nn.MultiheadAttention: recattn.nn.SinkAttention})


@provoked
def patched_by_an_unknown_name(_):
    recattn.patch(nn.ModuleDict({"attn": nn.MultiheadAttention(2, 1)}), {"attn.0": recattn.nn.SinkAttention})


@provoked
def options_by_position(_):
    encoder = nn.TransformerEncoderLayer(8, 2)
    recattn.patch(encoder, {nn.MultiheadAttention: functools.partial(recattn.nn.RefinedSelfAttention, 50)})


@provoked
def restored_in_another_order(_):
    encoder = nn.TransformerEncoderLayer(8, 2)
    first = recattn.patch(encoder, {nn.MultiheadAttention: recattn.nn.SinkAttention})
    recattn.patch(encoder, {recattn.nn.SinkAttention: lambda old, name: nn.Identity()})
    first.restore()


# --- Gradients ---


@provoked
def second_derivative_after_dropout(_):
    q = torch.ones(2, 4, 8, 16, requires_grad=True)
    out = call_sink_attention(q=q, dropout_p=0.1)
    torch.autograd.grad(out.sum(), q, create_graph=True)


@provoked
def second_derivative_of_a_compiled_function(_):
    x = torch.ones(2, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.compile(torch.sin, backend="aot_eager")(x).sum(), x, create_graph=True)
    slope.sum().backward()


@provoked
def forward_mode_by_a_kernel(_):
    q = torch.ones(2, 4, 8, 16)
    torch.func.jvp(lambda q: call_sink_attention(q=q, impl="cpu"), (q,), (q,))


@provoked
def gradient_of_a_served_target(_):
    keys = torch.ones(2, 1, 2, 4)
    targets = torch.ones(1, 1, 4, requires_grad=True)
    recattn.lrea_absorbed_attention(targets, keys, keys, torch.tensor([1]), torch.tensor([0, 1]), impl="cpu")


# --- Serving ---


@provoked
def state_with_nan(_):
    keys = torch.full((1, 1, 2, 4), torch.nan)
    state_table().put(torch.tensor([7]), keys, keys)


@provoked
def request_that_is_over(_):
    with state_table().request(torch.tensor([7])) as request:
        pass
    request.attend(torch.ones(1, 1, 4), torch.tensor([0, 1]))


@provoked
def pickled_table(_):
    pickle.dumps(state_table())


@provoked
def rows_pinned(_):
    table, state = state_table(), torch.ones(2, 1, 2, 4)
    table.put(torch.tensor([1, 2]), state, state)
    with table.request(torch.tensor([1, 2])):
        table.put(torch.tensor([3]), state[:1], state[:1])


@provoked
def damaged_file(_):
    saved = state_table().state_dict()
    state_table().load_state_dict({**saved, "checksum": saved["checksum"] + 1})


@provoked
def other_sizes(_):
    recattn.serving.StateTable(2, heads=1, rank=4, dim=4).load_state_dict(state_table().state_dict())


@provoked
def full_history(_):
    lrea = recattn.nn.LREA(embed_dim=4, max_len=3, rank=2)
    lrea.append(lrea.export_state(torch.ones(1, 3, 4)), torch.ones(1, 4))


def store(model: str = "2026-11", **options: object) -> recattn.serving.LMDBStore:
    schema = recattn.serving.StateSchema(1, 2, 4, 4, torch.float32, model)
    return recattn.serving.LMDBStore("states", schema, **options)


def put(store: recattn.serving.StateStore, users: int) -> None:
    keys = torch.ones(users, 1, 2, 4)
    store.put_many(torch.arange(users), recattn.nn.LREAState(keys, keys, None, None))


@provoked
def state_of_another_model(monkeypatch):
    with TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        with store("2026-10") as old:
            put(old, 8)
        with store() as new:
            new.get_many(torch.tensor([7]))


@provoked
def damaged_record(monkeypatch):
    with TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        with store() as states:
            put(states, 8)
            file = Path("states", "data.mdb")
            content = file.read_bytes()
            user = content.rindex((7).to_bytes(8, "little") + bytes([255] * 8))
            file.write_bytes(content[: user + 24] + b"x" + content[user + 25 :])
            states.get_many(torch.tensor([7]))


@provoked
def store_that_is_full(monkeypatch):
    with TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        with store(max_bytes=1 << 15) as states:
            put(states, 1000)


def put_into_redis() -> None:
    schema = recattn.serving.StateSchema(1, 2, 4, 4, torch.float32, "2026-11")
    with recattn.serving.RedisStore("redis://127.0.0.1:1", schema) as states:
        put(states, 1)


@provoked
def redis_that_is_full(monkeypatch):
    answer = redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
    monkeypatch.setattr(redis.client.Pipeline, "execute", lambda *_, **__: [answer])
    put_into_redis()


@provoked
def redis_that_does_not_run(_):
    put_into_redis()


def without(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"recattn.serving.stores.{library}")


@provoked
def without_lmdb(monkeypatch):
    without("lmdb", monkeypatch)
    recattn.serving.LMDBStore  # noqa: B018


@provoked
def without_redis(monkeypatch):
    without("redis", monkeypatch)
    recattn.serving.RedisStore  # noqa: B018


# --- Models of other libraries ---


@provoked
def without_the_library(_):
    with importing("RecBole", module="recbole", extra="recbole"):
        raise ModuleNotFoundError("No module named 'recbole'", name="recbole")


@provoked
def without_what_the_library_imports(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.1")
    with importing("RecBole", module="recbole", extra="recbole"):
        raise ModuleNotFoundError("No module named 'colorlog'", name="colorlog")


@provoked
def old_transformers(_):
    find_generation("4.46.3")


def small_bert() -> BertForSequenceClassification:
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "vocab_size": 20,
    }
    return BertForSequenceClassification(BertConfig(**sizes))


@provoked
def bias_that_no_head_reads(_):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        enable_sink_attention(small_bert(), sink_token_id=5)


@provoked
def bias_that_transformers_leaves_out(monkeypatch):
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        monkeypatch.chdir(folder)
        model = small_bert()
        enable_sink_attention(model, sink_token_id=5, layers=2)
        model.save_pretrained("ranker")
        warnings.simplefilter("error", UserWarning)
        BertForSequenceClassification.from_pretrained("ranker")


QUOTED = [" ".join(message.split()) for message in QUOTES.findall(PAGE.read_text())]


@pytest.mark.parametrize("call", PROVOKED, ids=lambda call: call.__name__)
def test_message_is_on_the_page(call, monkeypatch):
    """Word by word; … on the page stands for a number."""
    with pytest.raises(Exception) as raised:
        call(monkeypatch)
    message = f"{raised.type.__name__}: {raised.value}"
    assert [quote for quote in QUOTED if matches(quote, message)], message


def test_no_other_message_is_on_the_page():
    assert len(QUOTED) == len(set(QUOTED)) == len(PROVOKED)


def matches(quote: str, message: str) -> bool:
    return re.fullmatch(re.escape(quote).replace("…", r"\d+"), message) is not None
