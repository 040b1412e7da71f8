"""How fast quality is measured, on the embedded model: python benchmarks/quality.py [--data-root FOLDER]

The embedded tasks, in seconds. And, with benchmark data, ARC-Easy scored by lm-eval's own HFLM at its best batch size and
by sweep's scorer, piece by piece in turn, since the speed of a shared machine drifts: seconds, the median ratio of the
pieces, both accuracies, and by how much the log-likelihoods differ. Then answers that are written, likewise: seconds of the
processor, and how many answers are equal. Of the embedded tasks, and with data of `gsm8k`, which shows other examples before
each question, and `gsm8k_cot`, which shows the same ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from embedded import EMBEDDED
from lm_eval.models.huggingface import HFLM
from tabulate import tabulate

from sweep.config import Benchmarks
from sweep.measuring import catalogue, generation, quality, scorer
from sweep.models import loading
from sweep.texts import embedded

BATCH_SIZES = (1, 4, 8, 16, 32, 64)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    outcome = work()
    return time.perf_counter() - start, outcome


def all_embedded(model: Any, tokenizer: Any) -> str:
    lines = []
    for task in embedded.EMBEDDED:
        taken, (metrics, samples) = seconds(partial(quality.evaluate, model, tokenizer, Benchmarks((task,)), None))
        name, value = next((name, v) for name, v in metrics.items() if name.endswith(("/acc", "/token_perplexity")))
        lines.append((task, samples.document.nunique(), taken, name, value))
    return tabulate(lines, headers=["task", "documents", "seconds", "metric", "value"], floatfmt=".4g")


def arc_easy(model: Any, tokenizer: Any, data_root: str, questions: int, piece: int) -> str:
    task = catalogue.load(Benchmarks(("arc_easy",)), data_root)["tasks"]["arc_easy"]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=questions)
    by_question: dict[int, list[Any]] = {}
    for request in task.instances:
        by_question.setdefault(request.doc_id, []).append(request)
    answers = [task.doc_to_target(task.eval_docs[i]) for i in by_question]
    grouped = list(by_question.values())
    probe = [request for group in grouped[:40] for request in group]

    def theirs(batch_size: int) -> Any:
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=2048)

    timed = {n: seconds(partial(theirs(n).loglikelihood, probe, disable_tqdm=True))[0] for n in BATCH_SIZES}
    best = min(timed, key=lambda n: timed[n])
    hflm, ours = theirs(best), scorer.Scorer(model, tokenizer, batch_size=4, max_length=2048)
    totals, ratios, right, gaps = [0.0, 0.0], [], [0, 0], []
    for start in range(0, len(grouped), piece):
        groups = grouped[start : start + piece]
        flat = [request for group in groups for request in group]
        order = [0, 1] if (start // piece) % 2 == 0 else [1, 0]
        taken = [0.0, 0.0]
        found: list[list[Any]] = [[], []]
        for which in order:
            score = (hflm, ours)[which].loglikelihood
            taken[which], found[which] = seconds(partial(score, flat, disable_tqdm=True))
        totals = [a + b for a, b in zip(totals, taken, strict=True)]
        ratios.append(taken[0] / taken[1])
        gaps += [abs(a - b) for (a, _), (b, _) in zip(*found, strict=True)]
        for which in order:
            at = 0
            for group, answer in zip(groups, answers[start : start + piece], strict=True):
                values = [value for value, _ in found[which][at : at + len(group)]]
                right[which] += values.index(max(values)) == answer
                at += len(group)
    lines = [
        ("HFLM", best, totals[0], right[0] / len(grouped)),
        ("sweep", "4 x 128", totals[1], right[1] / len(grouped)),
    ]
    table = tabulate(lines, headers=["ARC-Easy", "batch size", "seconds", "acc"], floatfmt=".4g")
    tried = ", ".join(f"{n}: {t:.1f} s" for n, t in timed.items())
    return (
        f"{table}\n{len(grouped)} questions; HFLM over 40 questions by batch size: {tried}\n"
        f"median ratio of {len(ratios)} pieces: {statistics.median(ratios):.2f} (bar 2.5)\n"
        f"difference of log-likelihoods: median {statistics.median(gaps):.4f}, largest {max(gaps):.4f}"
    )


def answers(model: Any, tokenizer: Any, data_root: str | None, name: str, questions: int, piece: int) -> str:
    task = catalogue.load(Benchmarks((name,)), data_root)["tasks"][name]
    task.set_fewshot_seed(Benchmarks.fewshot_seed)
    task.build_all_requests(limit=questions)
    asked = task.instances
    ours = scorer.Scorer(model, tokenizer, batch_size=4, max_length=2048)

    def theirs(batch_size: int) -> Any:
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=2048)

    def worked(lm: Any, requests: Any) -> tuple[float, list[str]]:
        start = time.process_time()
        found = lm.generate_until(requests, disable_tqdm=True)
        return time.process_time() - start, found

    timed = {n: worked(theirs(n), asked[:piece])[0] for n in BATCH_SIZES if n <= piece}
    hflm = theirs(min(timed, key=lambda n: timed[n]))
    totals, ratios, alike = [0.0, 0.0], [], 0
    for start in range(0, questions, piece):
        requests = asked[start : start + piece]
        order = [0, 1] if (start // piece) % 2 == 0 else [1, 0]
        results = {which: worked((hflm, ours)[which], requests) for which in order}
        taken = [results[which][0] for which in (0, 1)]
        totals = [a + b for a, b in zip(totals, taken, strict=True)]
        ratios.append(taken[0] / taken[1])
        alike += sum(a == b for a, b in zip(results[0][1], results[1][1], strict=True))
    written = [len(answer.tokens) for found in ours.answers.values() for answer in found]
    read = [len(ours.question(*request.args).tokens) for request in asked]
    lines = [("HFLM", hflm.batch_size, totals[0]), ("sweep", f"{generation.ROWS} side by side", totals[1])]
    table = tabulate(lines, headers=[name, "batch size", "CPU seconds"], floatfmt=".4g")
    tried = ", ".join(f"{n}: {t:.1f} s" for n, t in timed.items())
    return (
        f"{table}\n{questions} questions, prompts of {statistics.mean(read):.0f} and answers of "
        f"{statistics.mean(written):.0f} tokens; HFLM over {piece} by batch size: {tried}\n"
        f"median ratio of {len(ratios)} pieces: {statistics.median(ratios):.2f} (bar 2); {alike} answers equal"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="benchmark data, in folders named as the hub names them")
    parser.add_argument("--questions", type=int, default=2376)
    parser.add_argument("--piece", type=int, default=100, help="questions scored by one before the other has its turn")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--skip-embedded", action="store_true")
    parser.add_argument("--skip-choices", action="store_true")
    parser.add_argument("--answers", nargs="*", help="tasks whose answers are written, instead of all of them")
    parser.add_argument("--answered", type=int, default=64, help="questions of each of them")
    options = parser.parse_args()
    model, tokenizer = loading.load(EMBEDDED, options.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"{options.dtype}, {model.device}, {torch.get_num_threads()} threads")
    if not options.skip_embedded:
        print(all_embedded(model, tokenizer))
    if options.data_root and not options.skip_choices:
        print(arc_easy(model, tokenizer, options.data_root, options.questions, options.piece))
    tasks = [*embedded.GENERATIVE, *(["gsm8k", "gsm8k_cot"] if options.data_root else [])]
    for task in tasks if options.answers is None else options.answers:
        print(answers(model, tokenizer, options.data_root, task, options.answered, min(16, options.answered)))


if __name__ == "__main__":
    main()
