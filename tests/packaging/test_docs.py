"""The examples of the README and of docs/ run, and their links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

from recattn.ops import UNSUPPORTED_REASONS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += [ROOT / "tests" / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]
RESULTS = ("out", "bias", "mean_out", "cov_out", "h", "compressed", "state_keys", "state_values")


def examples_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if examples_of(page)], ids=lambda page: page.stem)
def test_examples(page, tmp_path, monkeypatch):
    """In the order in which a reader runs them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for example in examples_of(page):
        exec(example, namespace)
        assert all(namespace[name].isfinite().all() for name in RESULTS if f"\n{name} =" in f"\n{example}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_pages_are_in_the_site():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(listed)


def test_figures_are_as_new_as_the_reference():
    folder = ROOT / "docs" / "figures"
    spec = importlib.util.spec_from_file_location("draw", folder / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    stale = [f.__name__ for f in draw.DRAWINGS if f().svg() != (folder / f"{f.__name__}.svg").read_text()]
    assert stale == [], "python docs/figures/draw.py"


@pytest.mark.parametrize("op", [op for op in UNSUPPORTED_REASONS if (ROOT / "docs" / f"{op}.md").exists()])
def test_limits_name_every_implementation(op):
    _, limits = (ROOT / "docs" / f"{op}.md").read_text().split("## Limits\n")
    listed = re.findall(r"^\| `(\w+)` \|", limits.partition("\n## ")[0], flags=re.MULTILINE)
    assert sorted(listed) == sorted(UNSUPPORTED_REASONS[op]("cpu"))
