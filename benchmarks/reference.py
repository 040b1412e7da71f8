"""Known perplexities of dense models, measured again: python benchmarks/reference.py [--data-root FOLDER] [--windows N]

The embedded model needs WikiText-2 alone, which --data-root gives offline; the other lines need the model hub. A line
that cannot be measured says why. Exits 1 when a figure is off by more than its last digit allows.
"""

from __future__ import annotations

import argparse
import sys

from embedded import EMBEDDED
from tabulate import tabulate

from sweep.config import Model, Perplexity
from sweep.measuring import perplexity
from sweep.models import loading
from sweep.settings import RequestError

OPT = [Model(f"facebook/opt-{size}", "hub") for size in ("125m", "1.3b")]
REFERENCES = [  # model, dtype, windows, perplexity, tolerance, whose figure
    (EMBEDDED, "float32", 8, 19.134, 5e-4, "transformers alone, float32"),
    (EMBEDDED, "float32", 32, 21.81, 5e-3, "transformers alone, float32"),
    (OPT[0], "float32", None, 27.66, 2e-2, "SparseGPT (arXiv:2301.00774), dense"),
    (OPT[1], "float32", None, 14.62, 2e-2, "SparseGPT (arXiv:2301.00774), dense"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="benchmark data, in folders named as the hub names them")
    parser.add_argument("--windows", type=int, help="leave out references of more windows than this")
    options = parser.parse_args()
    lines, off = [], 0
    for model, dtype, windows, known, tolerance, source in REFERENCES:
        if options.windows and (windows is None or windows > options.windows):
            continue
        settings = Perplexity("wikitext2", windows=windows)
        try:
            perplexity.check(settings, options.data_root, model)
            columns, _ = perplexity.measure(
                *loading.load(model, dtype, "cpu"), settings, options.data_root, batch_size=4
            )
        except RequestError as error:
            lines.append((model.name, windows, None, known, None, source, str(error)[:60]))
            continue
        found = columns["wikitext2/perplexity"]
        agrees = abs(found - known) <= tolerance
        off += not agrees
        lines.append(
            (
                model.name,
                columns["perplexity_windows"],
                columns["perplexity_tokens"],
                known,
                found,
                source,
                "agrees" if agrees else "DIFFERS",
            )
        )
    heads = ["WikiText-2, windows of 2048", "windows", "tokens", "known", "measured", "known from", "verdict"]
    print(tabulate(lines, headers=heads, floatfmt=".3f"))
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
