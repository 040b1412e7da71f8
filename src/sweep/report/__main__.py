"""`python -m sweep.report results`: the command line of a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from sweep import messages
from sweep.report import asked, drawing, figures, published, rendering, watching
from sweep.settings import RequestError, did_you_mean


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exits 2 for a wrong request."""
    options = _parser().parse_args(arguments)
    first = options.results[0]
    out = options.out or Path("report" if "://" in first else f"{first}/report")
    try:
        if options.against:
            sys.exit(_compare(options))
        wanted = _wanted(options)
        if options.watch:
            watching.watch(options.results, lambda: _render(options, out, wanted))
        else:
            _render(options, out, wanted)
    except RequestError as error:
        sys.exit(messages.complain(error))


def _render(options: argparse.Namespace, out: Path, wanted: rendering.Wanted) -> None:
    files = rendering.report(options.results, out, wanted)
    print((out / "overview.txt").read_text())
    print(f"\n{len(files)} files in {out}" + ("" if options.no_html else f"; open {out / 'report.html'} in a browser"))


def _wanted(options: argparse.Namespace) -> rendering.Wanted:
    return rendering.Wanted(
        x=_given(options.x),
        y=_given(options.y),
        filters=tuple(options.filter),
        facet=options.facet,
        figures=_among("--figures", options.figures or "", [*(kind.name for kind in figures.KINDS), "all"]),
        width=options.width,
        limits=asked.limits(options.max_drop, options.max_ms, options.max_bytes),
        html=not options.no_html,
        formats=_among("--formats", options.formats, drawing.FORMATS),
    )


def _compare(options: argparse.Namespace) -> int:
    text, agrees = published.compare(asked.select(asked.read(options.results), options.filter), options.against)
    print(text)
    return 0 if agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sweep.report",
        description="What to choose, figures, tables and report.html from the rows of a sweep.",
        epilog="Example: python -m sweep.report results --x latency,memory --filter 'sparsity<=0.5' --max-drop 3%%",
    )
    add = parser.add_argument
    on_demand = [kind for kind in figures.KINDS if not kind.unasked]
    add("results", nargs="*", default=["results"], help="results folders (default: results)")
    add("--out", type=Path, help="folder for the report (default: RESULTS/report)")
    add("--x", help=f"costs to draw the metrics against, of {', '.join(asked.AXES)}, or columns; comma-separated")
    add("--y", help="task metrics, such as capitals/acc; comma-separated (default: the main one of each task)")
    add(
        "--filter",
        action="append",
        default=[],
        metavar="COLUMN=VALUE[,VALUE]",
        help="keep these rows; also != < <= > >=; may be given again",
    )
    add(
        "--facet",
        metavar="COLUMN",
        help="a figure for each value of this column (default: model, when there are several)",
    )
    add("--figures", help=f"more figures: all, or of {'; '.join(f'{k.name} ({k.meaning})' for k in on_demand)}")
    add("--width", choices=drawing.WIDTHS, help="of figures: one or two columns of a paper")
    add("--formats", default=",".join(drawing.FORMATS), help="files of a figure (default: png,svg,pdf)")
    add("--max-drop", help="one more line of the decision table: what may be lost, such as 3%%")
    add("--max-ms", type=float, help="likewise: what decoding a token may take, in milliseconds")
    add("--max-bytes", help="likewise: the peak memory, such as 800MB")
    add("--no-html", action="store_true", help="leave out report.html")
    add("--watch", action="store_true", help="make the report again as rows arrive, until Ctrl-C")
    add("--against", type=Path, metavar="CSV", help="print our numbers beside published ones, and write nothing")
    return parser


def _among(flag: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    given, names = tuple(word for word in text.split(",") if word), list(known)
    for name in given:
        if name not in names:
            near = did_you_mean(name, names)
            raise RequestError(f"{flag} must be among {', '.join(names)}, comma-separated; got {name!r}.{near}")
    return given


def _given(text: str | None) -> tuple[str, ...]:
    return (text,) if text else ()


if __name__ == "__main__":
    sys.exit(messages.guard(main))
