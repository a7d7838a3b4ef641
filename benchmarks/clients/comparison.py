"""A stock model and the same model with our attention, as a line of JSON."""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version

import torch

from recattn import _environment


@dataclass(frozen=True)
class Outcome:
    """One training."""

    seconds_per_epoch: float  # of the process on the CPU: a busy machine changes these less
    metric: float


@dataclass(frozen=True)
class Comparison:
    library: str  # with its version
    model: str
    attention: str  # ours
    epochs: int
    metric: str  # its name, with the data that it is of
    stock: Outcome
    ours: Outcome
    python: str
    numpy: str
    torch: str
    cpu: str
    kernels: str | None  # the instruction set of our C++ kernels; None if they are not there
    threads: int
    date: str


def compare(
    train: Callable[[bool], Outcome],
    *,
    library: str,
    package: str,
    model: str,
    attention: str,
    epochs: int,
    metric: str,
) -> None:
    """Print the comparison of train(False), the stock model, with train(True), the same with our attention."""
    comparison = Comparison(
        library=f"{library} {version(package)}",
        model=model,
        attention=attention,
        epochs=epochs,
        metric=metric,
        stock=train(False),
        ours=train(True),
        python=platform.python_version(),
        numpy=version("numpy"),
        torch=torch.__version__,
        cpu=_environment.device_name(torch.device("cpu")),
        kernels=_environment.cpu_capability(),
        threads=torch.get_num_threads(),
        date=str(date.today()),
    )
    print(json.dumps(asdict(comparison)), flush=True)
