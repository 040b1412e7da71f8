"""The documents of the embedded tasks, as lm-eval asks for them in a task's YAML (`custom_dataset: !function`)."""

from collections.abc import Callable
from typing import Any

import datasets

from sweep.texts import embedded


def _test_split(documents: Callable[[], list[dict[str, Any]]]) -> Callable[..., dict[str, datasets.Dataset]]:
    return lambda **_: {"test": datasets.Dataset.from_list(documents())}


pydoc = _test_split(embedded.pydoc_documents)
pydoc_development = _test_split(embedded.development_documents)
pydoc_cloze = _test_split(embedded.cloze_documents)
capitals = _test_split(embedded.capital_documents)
continents = _test_split(embedded.continent_documents)


def _with_examples(task: str) -> Callable[..., dict[str, datasets.Dataset]]:
    def splits(**_: Any) -> dict[str, datasets.Dataset]:
        parts = {"examples": embedded.examples(task), "test": embedded.EMBEDDED[task]()}
        return {part: datasets.Dataset.from_list(documents) for part, documents in parts.items()}

    return splits


copying, swapping, brackets, addition, capital_names = map(_with_examples, embedded.GENERATIVE)


def answered(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether what was written is the answer, apart from blanks around it."""
    return {"exact_match": float(results[0].strip() == document["answer"])}


def page_metrics(document: dict[str, Any], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood of a page with the number of words or bytes it is spread over."""
    (log_likelihood,) = results
    page = document["page"]
    words, size = len(page.split()), len(page.encode())
    return {
        "word_perplexity": (log_likelihood, words),
        "byte_perplexity": (log_likelihood, size),
        "bits_per_byte": (log_likelihood, size),
    }
