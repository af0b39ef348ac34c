"""The ``attnprobe`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attnprobe import __version__
from attnprobe.errors import AttnProbeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 for options or places that cannot work."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except AttnProbeError as error:
        print(f"attnprobe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("attnprobe: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnprobe",
        description="What every attention head does while a model trains.",
        epilog="'attnprobe COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"attnprobe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    markov = commands.add_parser(
        "markov",
        help="train the sticky Markov task under SGD, under the EM-like schedule and other arms, watched",
        description="Train the sticky Markov task with Lightning under plain SGD and under other arms, by default the "
        "EM-like schedule (value rate x10); watch the attention head of every seed, and write TensorBoard events, "
        "JSONL, a summary with confidence intervals and a picture to the first free run-NNN in the log directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    markov.add_argument("--logdir", type=Path, default=Path("runs/markov"), metavar="DIR", help="where runs go")
    markov.add_argument("--steps", type=_count(1), default=1000, metavar="N", help="training steps of each run")
    markov.add_argument("--seeds", type=_count(1), default=2, metavar="K", help="number of seeds")
    markov.add_argument("--length", type=_count(2), default=2000, metavar="T", help="length of the sequence")
    markov.add_argument(
        "--protocol",
        choices=("clean", "authors"),
        default="clean",
        help="clean: self-transition 0.3, each seed's own threshold; authors: as in their public script",
    )
    markov.add_argument(
        "--arms",
        default="sgd,v10",
        metavar="A,B",
        help="what is compared with sgd: momentum, adam, adamw or tuned (base rate); v, qk, o or all with a factor "
        "(v5: the value weights learn five times as fast); or both, as in adam-v10 and tuned-v10",
    )
    markov.add_argument("--jobs", type=_count(1), metavar="N", help="arms that train at once (default: one per core)")
    markov.set_defaults(run=_markov)

    paper = commands.add_parser(
        "paper",
        help="run one of the experiments that check the paper's claims; without a name, list them",
        description="Run one of the experiments that check the paper's claims, and write its numbers, its picture and "
        "TensorBoard events to the first free run-NNN below the directory. Without a name, list them.",
    )
    paper.add_argument("name", nargs="?", metavar="NAME", help="which experiment")
    paper.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="default: runs/paper")
    paper.add_argument("--seeds", type=_count(1), metavar="K", help="number of seeds (default: the experiment's own)")
    paper.add_argument("--steps", type=_count(1), metavar="N", help="training steps (default: the experiment's own)")
    paper.add_argument("--jobs", type=_count(1), metavar="N", help="trainings at once (default: one per core)")
    paper.set_defaults(run=_paper)

    toy = commands.add_parser(
        "toy",
        help="train the paper's closed form (T=5, 3 classes) and draw it",
        description="Train the paper's single-head example with hand-derived gradients and draw compatibility, "
        "advantage and attention maps and the paths of the values.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    toy.add_argument("--out", type=Path, default=Path("runs/toy.png"), metavar="PNG", help="the picture")
    toy.add_argument("--steps", type=_count(1), default=200, metavar="N", help="gradient descent steps")
    toy.add_argument("--lr", type=float, default=0.5, metavar="RATE", help="learning rate")
    toy.add_argument("--seed", type=int, default=0, metavar="S", help="random seed")
    toy.set_defaults(run=_toy)

    report = commands.add_parser(
        "report",
        help="tell what a logged run found: loss, alarms and the heads to look at; or compare two runs",
        description="Read the logs of JSONLWriter and TensorBoardWriter in a directory and beneath it, and print for "
        "each how many probes it holds, the loss, which alarms were raised from when to when and what to try, and the "
        "heads that most deserve a look. With --compare, print in what two runs differ.",
    )
    places = report.add_mutually_exclusive_group(required=True)
    places.add_argument(
        "directory", type=Path, nargs="?", metavar="RUN_DIR", help="where the run was logged, or a .jsonl file"
    )
    places.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="two such places, of one run each, instead"
    )
    forms = report.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print all of it as one JSON document")
    forms.add_argument("--html", type=Path, metavar="OUT", help="write a page to look at instead")
    report.add_argument(
        "--heads", type=_count(0), default=10, metavar="N", help="heads in the text, 0 for all (default: 10)"
    )
    report.set_defaults(run=_report)

    calibrate = commands.add_parser(
        "calibrate",
        help="set the alarms' thresholds from healthy runs of your own, and say what false alarms they imply",
        description="Read the logs of runs in which nothing was wrong, find for every threshold the tightest value at "
        "which none of them raises an alarm, write thresholds twice as loose, and print how many of the runs would "
        "have raised one by thresholds from the others.",
    )
    calibrate.add_argument(
        "directories", type=Path, nargs="+", metavar="RUN_DIR", help="where healthy runs were logged, or .jsonl files"
    )
    calibrate.add_argument(
        "--out", type=Path, default=Path("alarms.json"), metavar="JSON", help="the thresholds (default: alarms.json)"
    )
    calibrate.add_argument(
        "--uninformed-loss", type=float, metavar="X", help="as given to AttentionProbe (default: unknown)"
    )
    calibrate.add_argument(
        "--alarms", choices=("default", "all"), default="default", help="which rules (default: default)"
    )
    calibrate.set_defaults(run=_calibrate)
    return parser


def _count(least: int) -> type[int]:
    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a whole number is needed, not {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return count  # type: ignore[return-value]  # argparse takes any callable


def _markov(options: argparse.Namespace) -> str:
    from attnprobe.experiments.ensemble.arms import parse
    from attnprobe.experiments.markov.run import run

    sizes = {name: getattr(options, name) for name in ("steps", "seeds", "length", "protocol", "jobs")}
    return run(options.logdir, arms=parse(options.arms), **sizes)


def _paper(options: argparse.Namespace) -> str:
    from attnprobe.experiments.paper.base import EXPERIMENTS, run

    if options.name is None:
        width = max(map(len, EXPERIMENTS))
        return "\n".join(f"  {name:{width}}  {question}" for name, question in EXPERIMENTS.items())
    return run(options.name, options.out, seeds=options.seeds, steps=options.steps, jobs=options.jobs)


def _toy(options: argparse.Namespace) -> str:
    from attnprobe.experiments.toy import run

    return run(options.out, steps=options.steps, lr=options.lr, seed=options.seed)


def _report(options: argparse.Namespace) -> str:
    if options.html:
        return _page(options)
    from attnprobe.logs import load, read_logs
    from attnprobe.run_summary import compare, comparison_document, comparison_text, report_document, summarize
    from attnprobe.writers.strict_json import dumps

    if options.compare:
        a, b = map(str, options.compare)
        found = compare(load(a), load(b))
        return (
            dumps(comparison_document(found, (a, b))) if options.json else comparison_text(found, (a, b), options.heads)
        )
    runs = read_logs(options.directory)
    return dumps(report_document(runs)) if options.json else summarize(runs, options.heads)


def _page(options: argparse.Namespace) -> str:
    from attnprobe.logs import load, read_logs
    from attnprobe.view.html import write_page

    if options.compare:
        runs = {}
        for place in options.compare:
            load(place)  # says where it is not one run
            runs[str(place)] = max(read_logs(place, pictures=True).values(), key=len)
    else:
        runs = read_logs(options.directory, pictures=True)
    write_page(runs, options.html)
    return f"wrote {options.html}"


def _calibrate(options: argparse.Namespace) -> str:
    from attnprobe.calibrate import calibrate, read_runs, summarize

    runs = read_runs(options.directories)
    calibration = calibrate(runs, options.alarms, uninformed_loss=options.uninformed_loss)
    calibration.save(options.out)
    chosen, reference = ("", "") if options.alarms == "default" else (", 'all'", ", reference_batch=batch")
    loss = "" if options.uninformed_loss is None else f", uninformed_loss={options.uninformed_loss}"
    return (
        f"{summarize(calibration)}\n\nTo use them:\n"
        f"  from attnprobe.calibrate import load_alarms\n"
        f"  probe = attnprobe.AttentionProbe(model, alarms=load_alarms({str(options.out)!r}{chosen}){loss}{reference})"
    )


if __name__ == "__main__":
    sys.exit(main())
