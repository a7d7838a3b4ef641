"""An import that fails names the library, what is missing and the extra: with stand-ins for the libraries."""

import importlib
import sys
from pathlib import Path

import pytest
from torch import nn

from recattn.integrations.fuxictr import replace_target_attention
from recattn.integrations.recbole import patch_recbole
from recattn.integrations.torch_rechub import replace_attention

ROOT = Path(__file__).parents[2]
# By the library's module: its name, its extra, the module that we import, and a call that imports it.
LIBRARIES = {
    "fuxictr": (
        "FuxiCTR",
        "fuxictr",
        "fuxictr.pytorch.layers",
        lambda: replace_target_attention(nn.Linear(2, 2), 8, 2),
    ),
    "recbole": ("RecBole", "recbole", "recbole.model.layers", lambda: patch_recbole(nn.Linear(2, 2))),
    "rectools": ("RecTools", "rectools", "rectools.models.nn.transformers.sasrec", None),
    "torch_rechub": (
        "torch-rechub",
        "torch-rechub",
        "torch_rechub.models.ranking.din",
        lambda: replace_attention(nn.Linear(2, 2), 8, 2),
    ),
    "torchrec": ("TorchRec", "torchrec", "torchrec", None),
    "transformers": ("transformers", "hf", "transformers", None),
}
pytestmark = pytest.mark.parametrize("module", LIBRARIES)


@pytest.fixture
def library(module, monkeypatch):
    """What LIBRARIES says of it, with neither it nor our integration imported yet."""
    ours = f"recattn.integrations.{module}"
    name, extra, inner, call = LIBRARIES[module]
    call = call or (lambda: importlib.import_module(ours))

    def imported():
        return [known for known in sys.modules if f"{known}.".startswith((f"{module}.", f"{ours}."))]

    for known in imported():
        monkeypatch.delitem(sys.modules, known)
    yield name, extra, inner, call
    for known in imported():  # of a stand-in
        del sys.modules[known]


class Without:
    """Finds no module of a library."""

    def __init__(self, module):
        self.module = module

    def find_spec(self, name, path=None, target=None):
        if name == self.module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def install(folder, module, inner, source, monkeypatch):
    """A stand-in of version 9.9 whose module `inner` has this source."""
    *parents, leaf = inner.split(".")
    package = folder.joinpath(*parents)
    package.mkdir(parents=True, exist_ok=True)
    for depth in range(1, len(parents) + 1):
        folder.joinpath(*parents[:depth], "__init__.py").touch()
    (package / f"{leaf}.py").write_text(source)
    described = folder / f"{module}-9.9.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(folder)


def message(call):
    with pytest.raises(ImportError) as caught:
        call()
    return str(caught.value)


def test_not_installed(module, library, monkeypatch):
    name, extra, _, call = library
    monkeypatch.setattr(sys, "meta_path", [Without(module), *sys.meta_path])
    said = f'recattn.integrations.{module} needs {name}, which is not installed: pip install "recattn[{extra}]"'
    assert message(call) == said


@pytest.mark.parametrize(
    "source, reason",
    [
        ("import absent_library.part", "importing it needs absent_library, which is missing"),
        ("raise AttributeError('np.float_ was removed')", "importing it failed (np.float_ was removed)"),
        ("raise OSError('Could not load this library')", "importing it failed (Could not load this library)"),
        ("__version__ = '9.9'", "importing it failed (cannot import name "),
    ],
    ids=["inner package", "inner version", "inner library", "other version"],
)
def test_installed_but_not_importable(source, reason, module, library, tmp_path, monkeypatch):
    name, extra, inner, call = library
    install(tmp_path, module, inner, source, monkeypatch)
    said = message(call)
    assert said.startswith(f"{name} 9.9 is installed, but {reason}")
    assert said.endswith(f': pip install "recattn[{extra}]"')


def test_the_extra_exists(module):
    assert f"\n{LIBRARIES[module][1]} = [" in (ROOT / "pyproject.toml").read_text()
