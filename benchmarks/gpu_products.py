"""One matrix times few tokens on a GPU, in torch's own forms: python benchmarks/gpu_products.py

Microseconds, medians with the second-level cache flushed before each, for 1 and 128 tokens: what `execution=auto` would
gain there by running zeroed or quantised weights in a form of their own, in place of dense bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

SHAPES = ("5632x2048", "4096x14336")  # (out, in): an FFN's of a model of 1.1 and one of 8 billion parameters
GROUP = 32


def forms(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, the product of each form of a (R, C) matrix; its numbers are arbitrary where it is quantised."""
    rows, columns = weight.shape
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=weight.device)
    scales = torch.rand(rows, dtype=weight.dtype, device=weight.device)
    nibbles = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=weight.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    grid = torch.rand(columns // GROUP, rows, 2, dtype=weight.dtype, device=weight.device)
    two_of_four = weight.view(rows, -1, 4).clone()
    two_of_four[:, :, :2] = 0
    sparse = torch.sparse.to_sparse_semi_structured(two_of_four.view(rows, columns))
    return {
        "dense": lambda x: nn.functional.linear(x, weight),
        "int8, torch's kernel": lambda x: torch._weight_int8pack_mm(x, codes, scales),
        "int8, compiled": torch.compile(lambda x: nn.functional.linear(x, codes.to(x.dtype)) * scales),
        f"int4, groups of {GROUP}": lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, grid),
        "2:4": lambda x: nn.functional.linear(x, sparse),
    }


def main() -> None:
    from triton.testing import do_bench  # comes with torch's build for CUDA

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="ROWSxCOLUMNS")
    lines: dict[str, list[float | str]] = {}
    headers = ["form"]
    for shape in parser.parse_args().shapes:
        rows, columns = map(int, shape.split("x"))
        products = forms(torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda"))
        for tokens in (1, 128):
            x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
            headers.append(f"{shape}, {tokens}")
            for name, product in products.items():
                try:
                    took: float | str = 1e3 * do_bench(lambda p=product, x=x: p(x), return_mode="median")
                except RuntimeError as error:  # a shape that a form does not multiply
                    took = str(error).splitlines()[0][:40]
                lines.setdefault(name, []).append(took)
    print(torch.cuda.get_device_name())
    print(tabulate([(name, *took) for name, took in lines.items()], headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
