"""What differs between generations of transformers: a module each, named by its first version.

Importing a generation registers sink attention as `NAME`. Each has

- `ADAPTERS`: for each architecture it serves, by `config.model_type`, the `Adapter` that sets its attention and carries
  the sinks and the bias of a batch to it;
- `sink_attention_mask`: the mask function, with the arguments that this generation passes.
"""

import importlib
import re
from types import ModuleType

from recattn._imports import importing

# The first version of each generation, newest first.
GENERATIONS = {(5, 4): "v5_4", (5, 1): "v5_1", (5, 0): "v5_0", (4, 53): "v4_53", (4, 48): "v4_48"}
FLOOR = min(GENERATIONS)


def find_generation(version: str) -> str:
    """The name of the generation that serves this version of transformers."""
    installed = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    for first, name in GENERATIONS.items():
        if installed >= first:
            return name
    floor = ".".join(map(str, FLOOR))
    raise ImportError(
        f"recattn.integrations.transformers needs transformers {floor} or newer, "
        f'but {version} is installed: pip install "recattn[hf]"'
    )


def import_generation() -> ModuleType:
    """The generation of the installed transformers."""
    with importing("transformers", module="transformers", extra="hf"):
        from transformers import __version__ as version
    name = find_generation(version)
    with importing("transformers", module="transformers", extra="hf"):
        return importlib.import_module(f"{__name__}.{name}")


generation = import_generation()
