"""How far each proxy of importance is from the truth: `python experiments/neuron_importance/diagnose.py FOLDER`.

For a random sample of FFN neurons, the exact increase of the loss when one is removed, and what every proxy says of it
on the same text, so that a difference is the proxy's and not the text's. Written to FOLDER: `units.parquet` (one row a
neuron), `summary.parquet` (one row a criterion: rank correlation with the exact drop and with its size, over neurons,
with 95 % bootstrap intervals; rank correlation of the criterion with itself between two halves of the text), and the
figure `importance.png` with its SVG.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from sweep import messages, settings
from sweep.config import Calibration, Model
from sweep.models import loading
from sweep.pruning import criteria, drop, unit_statistics, units
from sweep.pruning.families import Neuron
from sweep.settings import RequestError
from sweep.texts import text

PROXIES = [criterion for criterion in criteria.declared("unit") if not criterion.measured]
_READ = {name for proxy in PROXIES for name in proxy.reads if criteria.READABLE["unit"][name].text}
_DRAWS = 2000


def spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
    """Rank correlation, which is Pearson's of the ranks; ties get their mean rank. NaN where one of the two is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return stats.pearsonr(*(stats.rankdata(values, axis=axis) for values in (x, y)), axis=axis).statistic


def interval(x: np.ndarray, y: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the rank correlation, by drawing pairs with replacement.

    Draws in which one of the two is constant say nothing, and are left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap((x, y), spearman, paired=True, n_resamples=_DRAWS, method="percentile", rng=seed)
    known = drawn.bootstrap_distribution[~np.isnan(drawn.bootstrap_distribution)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def measure(model: PreTrainedModel, tokens: Tensor, count: int, seed: int) -> pd.DataFrame:
    """One row a sampled neuron: block, unit, `drop`, every proxy, and each of them on two halves of the text.

    tokens  (texts, length), at least two texts; the halves are every other one
    """
    model = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    parts = units.parts(model, Neuron())
    draw = np.random.default_rng(seed)
    total = sum(part.units for part in parts)
    if not 2 <= count <= total:
        raise RequestError(f"--units must be 2 to {total}, the neurons of the model; got {count}")
    first = np.cumsum([0, *[part.units for part in parts]])
    chosen = np.sort(draw.choice(total, count, replace=False))
    block = np.searchsorted(first, chosen, side="right") - 1
    unit = chosen - first[block]
    ablations = [
        drop.Ablation(part.block, part.output, [torch.tensor([u]) for u in unit[block == index]])
        for index, part in enumerate(parts)
    ]
    base, found = drop.likelihoods(model, drop.probe_of_text(tokens), [a for a in ablations if a.columns])
    lost = (base - np.concatenate(found)) / (tokens.shape[1] - 1)  # (units, texts), nats a token
    columns: dict[str, Any] = {"block": block, "unit": unit}
    texts = {"": slice(None), "_half_0": slice(0, None, 2), "_half_1": slice(1, None, 2)}
    for suffix, rows in texts.items():
        columns[f"drop{suffix}"] = lost[:, rows].mean(1)
        outputs = [part.output for part in parts]
        seen = unit_statistics.read(_READ, model, outputs, [1] * len(outputs), tokens[rows], seed)
        of_parts = [{name: found[i] for name, found in seen.items()} for i in range(len(parts))]
        for proxy in PROXIES:
            generator = torch.Generator().manual_seed(seed + len(suffix) + int(suffix[-1:] or 0))
            scores = torch.cat(
                [units.score(proxy, part, s, generator) for part, s in zip(parts, of_parts, strict=True)]
            )
            columns[f"{proxy.name}{suffix}"] = scores.cpu().numpy()[chosen]
    return pd.DataFrame(columns)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a criterion, the nearest to the exact drop first."""
    rows = []
    for name in ["drop", *(proxy.name for proxy in PROXIES)]:
        score, exact = frame[name].to_numpy(), frame["drop"].to_numpy()
        halves = frame[f"{name}_half_0"].to_numpy(), frame[f"{name}_half_1"].to_numpy()
        row: dict[str, Any] = {"criterion": name, "units": len(frame)}
        for column, pair in (("with_drop", (score, exact)), ("with_size", (score, abs(exact))), ("halves", halves)):
            row[column] = float(spearman(*pair))
            row[f"{column}_low"], row[f"{column}_high"] = interval(*pair)
        rows.append(row)
    return pd.DataFrame(rows).sort_values("with_drop", ascending=False, ignore_index=True)


def draw_figure(summary: pd.DataFrame, folder: Path) -> None:
    """Three panels of points with intervals, one line a criterion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "with_drop": "with the measured drop",
        "with_size": "with the size of the drop",
        "halves": "between two halves of the text",
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 0.35 * len(summary) + 1.2), sharey=True, layout="constrained")
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        shown = summary[summary.criterion != "drop"] if column != "halves" else summary
        place = shown.index.to_numpy()
        span = [shown[column] - shown[f"{column}_low"], shown[f"{column}_high"] - shown[column]]
        axis.errorbar(shown[column], place, xerr=np.clip(span, 0, None), fmt="o", color="#1f5fa8", capsize=3)
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.set(title=title, xlabel="rank correlation", xlim=(-0.55, 1.05))
    axes[0].set_yticks(range(len(summary)), summary.criterion)
    axes[0].invert_yaxis()
    for kind in ("png", "svg"):
        figure.savefig(folder / f"importance.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)


def find_model(name: str, path: str | None) -> Model:
    """The model of conf/model/NAME.yaml. Raises RequestError when there is no such file."""
    from sweep.__main__ import conf_folder

    folder = conf_folder() / "model"
    if not (folder / f"{name}.yaml").is_file():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        raise RequestError(
            f"--model {name}: there is no such model.{settings.did_you_mean(name, known)} Allowed: {', '.join(known)}"
        )
    values = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    assert isinstance(values, dict)
    changed = {} if path is None else {"path": path, "name": Path(path).name}
    return settings.build(Model, {str(k): v for k, v in (values | changed).items()}, "model")


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="receives the tables and the figure")
    parser.add_argument("--model", default="smollm2", help="a name in conf/model")
    parser.add_argument("--path", help="checkpoint folder of --model local")
    parser.add_argument("--units", type=int, default=150, help="neurons whose drop is measured")
    parser.add_argument("--texts", type=int, default=8, help="at least 2")
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--source", default="pydoc", help="calibration source: pydoc or a text file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of the processor; all by default")
    asked = parser.parse_args(arguments)
    if asked.texts < 2 or asked.tokens < 2:
        raise RequestError(
            f"--texts and --tokens must be at least 2, got {asked.texts} and {asked.tokens}: the "
            "stability is that between two halves of the texts"
        )
    if asked.threads:
        torch.set_num_threads(asked.threads)
    model, tokenizer = loading.load(find_model(asked.model, asked.path), "float32", "cpu")
    tokens = text.calibration_tokens(Calibration(asked.source, asked.texts, asked.tokens), tokenizer, asked.seed)
    frame = measure(model, tokens, asked.units, asked.seed)
    summary = summarise(frame)
    asked.folder.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(asked.folder / "units.parquet", index=False)
    summary.to_parquet(asked.folder / "summary.parquet", index=False)
    draw_figure(summary, asked.folder)
    print(summary.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    sys.exit(messages.guard(main))
