"""The README's examples run."""

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_examples(tmp_path, monkeypatch):
    """From the first to the last, as a reader goes."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    results = []
    for example in EXAMPLES:
        exec(example, namespace)
        results += [namespace[name] for name in ("out", "bias", "mean_out", "cov_out", "h") if f"{name} =" in example]
    assert len(results) >= 6 and all(result.isfinite().all() for result in results)
