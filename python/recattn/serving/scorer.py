"""A scorer that needs no Python: absorbed attention compiled to a package that reads records as a store holds them."""

import copy
import math
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from recattn._check import FLOATING, expect, expect_dtype, expect_numbers, expect_shape, expect_tensors
from recattn.functional import lrea_absorbed_attention
from recattn.serving.stores.records import Kind, RecordFormat
from recattn.serving.stores.schema import StateSchema, as_state

CONFIG = """\
# {schema}
name: "{name}"
backend: "pytorch"
platform: "torch_aoti"
max_batch_size: 0
input [
  {{ name: "INPUT__0" data_type: TYPE_UINT8 dims: [ -1, {nbytes} ] }},  # records
  {{ name: "INPUT__1" data_type: TYPE_INT64 dims: [ -1 ] }},  # item_ids
  {{ name: "INPUT__2" data_type: TYPE_INT64 dims: [ -1 ] }}  # target_offsets
]
output [ {{ name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ {dims} ] }} ]
instance_group [ {{ kind: {kind} }} ]
"""


class DotScore(nn.Module):
    """h·target, summed in float64: the float32 score is then the same in whatever order a compiler sums."""

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        return (h.double() * targets.double()).sum(-1).float()


class Scorer(nn.Module):
    """What `export_scorer` compiles."""

    def __init__(
        self, record_format: RecordFormat, items: Tensor, negative_slope: float, score: nn.Module | None
    ) -> None:
        super().__init__()
        self.record_format = record_format
        self.negative_slope = negative_slope
        self.score = DotScore() if score is None else copy.deepcopy(score).eval()
        self.register_buffer("items", items.detach())
        self.items: Tensor

    def forward(self, records: Tensor, item_ids: Tensor, target_offsets: Tensor) -> Tensor:
        known = (item_ids >= 0) & (item_ids < self.items.shape[0])
        rows = item_ids.where(known, 0)  # one unknown item must not fail a batch
        state = as_state(self.record_format.views(records))
        h = lrea_absorbed_attention(
            self.items.unsqueeze(1).expand(-1, self.record_format.schema.heads, -1),
            state.keys,
            state.values,
            torch.arange(records.shape[0], device=records.device),
            target_offsets,
            item_ids=rows,
            key_scales=state.key_scales,
            value_scales=state.value_scales,
            negative_slope=self.negative_slope,
        )
        scores = self.score(h.flatten(1), self.items[rows])
        layout = "T" if scores.dim() == 1 else "T n"
        expect_shape({"T": item_ids.shape[0]}, "score(h, targets)", scores, layout)
        return scores.float().where(known if scores.dim() == 1 else known.unsqueeze(-1), -math.inf)


@torch.no_grad()
def export_scorer(
    folder: str | Path,
    schema: StateSchema,
    items: Tensor,
    *,
    negative_slope: float,
    score: nn.Module | None = None,
) -> Path:
    """Compile a scorer of this schema's records into a folder that a program without Python serves from:

        h = φ(e_t keys[u]ᵀ) values[u]        as `LREA.attend`; t is a candidate of user u, and e_t its row in items
        scores = h·e_t                       or score(h, e_t)

    The folder is a model directory of NVIDIA's Triton Inference Server, and all that a C++ program needs:

        1/model.pt2           the package (`torch.export`, AOTInductor), with the items and the score in it
        1/empty_record.bin    a record of a user without a state: as long as every record, and bytes 8 to 40 are those
                              that every record of the schema has
        ops/                  the operator libraries, to be loaded before the package
        config.pbtxt          the configuration for Triton

    The package takes three tensors on the device of `items` and returns one:

        records [U, nbytes] uint8       as a store holds them, after their checks; an empty one for a missing user
        item_ids [T] int64              rows of items: the candidates of user 0, of user 1, ...
        target_offsets [U + 1] int64    ascending from 0 to T; those of user u are target_offsets[u:u + 2]
        scores [T] or [T, n] float32    -inf for an id that is not a row of items

    Compile it with the torch version that serves it, and on a CPU of the same kind.

    Source: our own.

    Args:
        folder: new or empty; its name is the model's. Export into another folder to replace a scorer that runs.
        schema: of the records.
        items: embedding table [I, d], float32 or the schema's dtype; for int8 states any floating dtype.
        negative_slope: of φ: `LREA.absorbed_negative_slope`.
        score: maps h [T, H·dv] and the targets [T, d], both in the dtype of items, to scores [T] or [T, n]. A copy in
            eval mode is compiled. By default their dot product, summed in float64 and rounded to float32, which takes
            H·dv = d.

    Returns:
        The folder.

    Raises:
        ValueError: an argument does not fit.
        ImportError: xxhash is not installed.
    """
    folder = Path(folder)
    _check_arguments(folder, schema, items, negative_slope, score)
    record_format = RecordFormat(schema, Kind.STATE)
    scorer = Scorer(record_format, items, negative_slope, score)
    empty = torch.frombuffer(bytearray(record_format.empty), dtype=torch.uint8).to(items.device)
    # Sizes other than 0 and 1, which torch.export would take for constants.
    offsets = torch.tensor([0, 2, 5], device=items.device)
    example = (empty.repeat(2, 1), torch.zeros(5, dtype=torch.int64, device=items.device), offsets)
    scores = scorer(*example)
    exported = torch.export.export(scorer, example, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 3)
    config = CONFIG.format(
        schema=schema,
        name=folder.resolve().name,
        nbytes=record_format.nbytes,
        dims=", ".join(["-1", *map(str, scores.shape[1:])]),
        kind="KIND_GPU" if items.is_cuda else "KIND_CPU",
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scorer-", dir=folder.parent) as temporary:
        made = Path(temporary) / "made"  # moved when it is whole: a server may be watching
        (made / "1").mkdir(parents=True)
        (made / "ops").mkdir()
        torch._inductor.aoti_compile_and_package(exported, package_path=str(made / "1" / "model.pt2"))
        (made / "1" / "empty_record.bin").write_bytes(record_format.empty)
        for library in Path(__file__).parents[1].glob("_C*.so"):
            shutil.copy(library, made / "ops")
        (made / "config.pbtxt").write_text(config)
        made.replace(folder)
    return folder


def _check_arguments(
    folder: Path, schema: StateSchema, items: Tensor, negative_slope: float, score: nn.Module | None
) -> None:
    unused = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    expect(unused, "folder", "new or empty, as a running scorer may read what is there", folder)
    expect(isinstance(schema, StateSchema), "schema", "a StateSchema", type(schema).__name__)
    expect_tensors(items=items)
    expect_shape({"d": schema.dim}, "items", items, "I d")
    expect(len(items) > 0, "I of items", "at least 1", 0)
    expect_dtype("items", items, FLOATING if schema.dtype == torch.int8 else (torch.float32, schema.dtype))
    expect_numbers(negative_slope=negative_slope)
    width = schema.heads * schema.value_dim
    if score is None:
        expected = f"a module that maps h [T, {width}] and targets [T, {schema.dim}] to scores, as H·dv is not d"
        expect(width == schema.dim, "score", expected, None)
    else:
        expect(isinstance(score, nn.Module), "score", "a torch.nn.Module or None", type(score).__name__)
