"""What mkdocs cannot do itself: pages that lie outside docs/, and links to them.

The pages read well on GitHub as they are, where a link may lead to any file of the repository.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages of the repository that are pages of the site too, with their figures.
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/QUALITY.md",
    "benchmarks/README.md",
    "benchmarks/RESULTS.md",
    "benchmarks/figures/*.svg",
    "tests/README.md",
    "tests/packaging/versions.md",
)
LINK = re.compile(r"\[(?P<text>[^][]*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(page.file.abs_src_path).relative_to(ROOT)

    def in_site(link: re.Match) -> str:
        target = posixpath.normpath((source.parent / link["path"]).as_posix())
        found = _find(target, files)
        if found is None:  # a file of the repository that is no page: its name says where
            text, name = link["text"].strip("`"), target.rstrip("/")
            return f"`{name}`" if text in name else f"{link['text']} (`{name}`)"
        relative = posixpath.relpath(found.src_uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{link['text']}]({relative}{link['anchor'] or ''})"

    code = CODE.findall(markdown)
    prose = [LINK.sub(in_site, text) for text in CODE.split(markdown)]
    return "".join(text + block for text, block in zip(prose, [*code, ""], strict=True))


def _find(path: str, files: Files) -> File | None:
    """What the site has of a path of the repository."""
    file = files.get_file_from_path(path.removeprefix("docs/"))
    return file if file is not None and Path(file.abs_src_path) == ROOT / path else None
