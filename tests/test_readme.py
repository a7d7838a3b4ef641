"""The README's examples run."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "operator, result", [("sink_attention", "out"), ("refined_attention", "out"), ("lrea_attention", "h")]
)
def test_example(operator, result):
    example = next(example for example in EXAMPLES if f"recattn.{operator}(" in example)
    namespace: dict[str, object] = {}
    exec(EXAMPLES[0].partition("\n\n")[0] + "\n" + example, namespace)  # the imports stand in the first one
    assert namespace[result].isfinite().all()
