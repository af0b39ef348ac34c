"""Run the experiments on the paper and write their numbers and pictures into docs/paper.md.

python docs/make_paper.py                  everything, about half an hour on two cores
python docs/make_paper.py manifold         some of them
python docs/make_paper.py --page           only the page, from the numbers that are there
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from attnprobe.experiments.markov.summary import comparison
from attnprobe.experiments.paper.base import EXPERIMENTS, find

DOCS = Path(__file__).parent
PAGE, NUMBERS, PICTURES = DOCS / "paper.md", DOCS / "paper", DOCS / "images"
ARMS = "sgd,v5,v10,qk10,o10,all3.16,all10,momentum,adam,adamw"
TUNED = "sgd,v10,tuned,tuned-v10,tuned-qk10"
COMMANDS = {
    "markov-authors": ["markov", "--protocol", "authors", "--seeds", "5"],
    "markov-clean": ["markov", "--seeds", "20", "--length", "500", "--arms", ARMS],
    "markov-tuned": ["markov", "--seeds", "20", "--length", "500", "--arms", TUNED],
    **{name: ["paper", name] for name in EXPERIMENTS},
}


def measure(name: str) -> None:
    """Run one command in a process of its own, and keep its numbers and its picture."""
    with tempfile.TemporaryDirectory() as place:
        where = "--logdir" if COMMANDS[name][0] == "markov" else "--out"
        subprocess.run([sys.executable, "-m", "attnprobe.cli", *COMMANDS[name], where, place], check=True)
        (run,) = Path(place).rglob("run-001")
        (numbers,) = [*run.glob("summary.json"), *run.glob("result.json")]
        NUMBERS.mkdir(exist_ok=True)
        shutil.copy(numbers, NUMBERS / f"{name}.json")
        for picture in [*run.glob("summary.png"), *run.glob("figure.png")]:
            shutil.copy(picture, PICTURES / f"paper-{name}.png")


def block(name: str) -> str:
    """The command, its numbers in words and its picture, as Markdown."""
    result = json.loads((NUMBERS / f"{name}.json").read_text())
    lines = comparison(result) if name.startswith("markov") else find(name).describe(result)
    text = "\n".join(lines).strip("\n")
    return f"`attnprobe {' '.join(COMMANDS[name])}`\n\n```text\n{text}\n```\n\n![{name}](images/paper-{name}.png)\n"


def page(text: str) -> str:
    """``text`` with every block between its marks made anew."""
    for name in COMMANDS:
        begin, end = f"<!-- measured: {name} -->\n", "<!-- end -->"
        before, mark, rest = text.partition(begin)
        if not mark:
            raise SystemExit(f"{PAGE.name} has no place for {name}")
        if (NUMBERS / f"{name}.json").exists():
            text = f"{before}{begin}\n{block(name)}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    chosen = [] if sys.argv[1:] == ["--page"] else sys.argv[1:] or [*COMMANDS]
    if unknown := set(chosen) - set(COMMANDS):
        raise SystemExit(f"no experiment is called {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    for name in chosen:
        measure(name)
    PAGE.write_text(page(PAGE.read_text()))
