"""What differs between generations of transformers: a module each, named by its first version.

Importing a generation registers sink attention as `NAME`. Each has

- `ADAPTERS`: for each architecture it serves, by `config.model_type`, the `Adapter` that sets its attention and carries
  the sinks and the bias of a batch to it;
- `sink_attention_mask`: the mask function, with the arguments that this generation passes.
"""

import importlib
import re
from types import ModuleType

# The first version of each generation, newest first.
GENERATIONS = {(5, 4): "v5_4"}
FLOOR = min(GENERATIONS)
_INSTALL = 'pip install "recattn[hf]"'


def find_generation(version: str) -> str:
    """The name of the generation that serves this version of transformers."""
    installed = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    for first, name in GENERATIONS.items():
        if installed >= first:
            return name
    floor = ".".join(map(str, FLOOR))
    raise ImportError(
        f"recattn.integrations.transformers needs transformers {floor} or newer, got {version}: {_INSTALL}"
    )


def import_generation() -> ModuleType:
    """The generation of the installed transformers."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"recattn.integrations.transformers needs transformers: {_INSTALL}") from error
    return importlib.import_module(f"{__name__}.{find_generation(transformers.__version__)}")


generation = import_generation()
