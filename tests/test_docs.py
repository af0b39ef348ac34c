"""What the documentation shows works, and what is generated is up to date."""

import importlib.util
import re
from pathlib import Path

import pytest

from attnprobe import STATISTICS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/alarms.md", "docs/geometry.md", "docs/kernels.md", "docs/schedules.md")


def _blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*not have many workers")
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(page)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    if page == "README.md":
        assert list(tmp_path.glob("runs/a/events*"))
        assert namespace["report"]["entropy"].shape == (1, 4)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_no_heading_is_glued_to_a_sentence(page: str) -> None:
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^[^#\n]+##.*", prose, re.MULTILINE)


@pytest.mark.parametrize("page", ["../README.md", *sorted(path.name for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_the_statistics_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_statistics", ROOT / "docs" / "make_statistics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run make docs"
    assert all(f"### `{name}`" in module.page() for name in STATISTICS)


def test_the_rates_in_the_readme_are_those_of_the_page() -> None:
    rates = re.findall(r"\b\d+ of \d+\b", (ROOT / "README.md").read_text())
    assert len(rates) == 5
    page = (ROOT / "docs" / "alarms.md").read_text()
    assert [rate for rate in rates if f"| {rate} (" not in page] == []
