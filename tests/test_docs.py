"""What the documentation shows works, and what is generated is up to date."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from attnprobe import STATISTICS

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/alarms.md",
    "docs/attention-tab.md",
    "docs/geometry.md",
    "docs/kernels.md",
    "docs/schedules.md",
)


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


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_statistics_page_is_up_to_date() -> None:
    module = _script("make_statistics")
    assert module.PAGE.read_text() == module.page(), "run make docs"
    assert all(f"### `{name}`" in module.page() for name in STATISTICS)


def test_the_rates_in_the_readme_are_those_of_the_page() -> None:
    rates = re.findall(r"\b\d+ of \d+\b", (ROOT / "README.md").read_text())
    assert len(rates) == 5
    page = (ROOT / "docs" / "alarms.md").read_text()
    assert [rate for rate in rates if f"| {rate} (" not in page] == []


def test_the_papers_page_tells_what_the_experiments_measured() -> None:
    module = _script("make_paper")
    page = module.PAGE.read_text()
    assert page == module.page(page), "run docs/make_paper.py --page"
    for name, command in module.COMMANDS.items():
        result = json.loads((module.NUMBERS / f"{name}.json").read_text())
        assert result["steps"] >= 1000
        assert len(result["seeds"]) >= (5 if name == "markov-authors" else 10)
        assert f"attnprobe {' '.join(command)}" in page


def test_every_number_of_the_claims_is_measured() -> None:
    """What the table says with an interval stands in the measured parts below it, and every claim has a command."""
    module = _script("make_paper")
    table = [line for line in module.PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    measured = "\n".join(module.block(name) for name in module.COMMANDS)
    assert len(table) >= 12
    for line in table:
        _claim, command, numbers, verdict = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert command.startswith("`")
        assert verdict.startswith(("holds", "holds partly", "does not hold", "open"))
        for number in re.findall(r"[-\d.]+ \[[^\]]+\]", numbers):
            assert number in measured, number
