"""The pruned model as a draft for the dense one: what it would bring, from what is measured of it anyway.

In speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) the draft writes some tokens, of which the other model,
reading all at once, keeps the first ones, so that text comes out as if it had written alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sweep.measuring import divergence

LONGEST = 64  # tokens that a draft may write at once


def speedup(acceptance: float, cost: float, length: int) -> float:
    """Theorem 3.8 of the paper: (1 - a^(g+1)) / ((1 - a) (g c + 1)).

    acceptance  a: the chance that a drafted token is kept, at each alike
    cost        c: the draft's time a token over the other model's
    length      g: tokens drafted at once; reading them all takes the other model as long as one token
    """
    kept = length + 1 if acceptance == 1 else (1 - acceptance ** (length + 1)) / (1 - acceptance)
    return kept / (length * cost + 1)


def columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """`draft_speedup` and `draft_length` at the best length; 1 and 0 where no draft pays, and none where either is unknown.

    row  with the acceptance on the pages that divergences are taken from, and the measured `decode_speedup`
    """
    acceptance, faster = row.get(f"{divergence.TASK}/draft_acceptance"), row.get("decode_speedup")
    if acceptance is None or not faster:
        return {}
    gains = [speedup(min(acceptance, 1.0), 1 / faster, length) for length in range(LONGEST + 1)]
    best = max(range(len(gains)), key=gains.__getitem__)
    return {"draft_speedup": gains[best], "draft_length": best}
