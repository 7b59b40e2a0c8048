"""Small shapes of every path, compared with the CPU: what compute-sanitizer is run over.

compute-sanitizer --tool memcheck python -m ops.sanitized cuda
"""

from __future__ import annotations

import sys
from typing import cast

import torch

import grace_kernels
from grace_kernels import Backend

from .problems import Place, compare, operations_of, plain_problem, random_problem


def main(backend: Backend, device: torch.device, truth: Backend) -> int:
    """Compare, print what differs, and return how many problems do."""
    place = Place(device, backend, truth)
    problems = [
        (random_problem(number, seed=3, large=False), operations_of(place, number))
        for number in range(12)
    ]
    problems += [
        (plain_problem(dtype, n, dim, batch, 33), ["adapt"])
        for dtype in (torch.bfloat16, torch.float32)
        for n, dim, batch in ((300, 100, 1), (300, 65, 9), (70, 768, 70))
    ]
    wrong = 0
    for problem, operations in problems:
        told = compare(place, problem, operations)
        wrong += bool(told)
        for line in told:
            print(f"{problem.name}: {line}")
    print(f"problems {len(problems)} wrong {wrong}", flush=True)
    return wrong


if __name__ == "__main__":
    if sys.argv[1] == "trivial":  # whether the tool works at all
        print(torch.zeros(4, device="cuda").add_(1).cpu().tolist())
    else:
        compiled = grace_kernels.build_info()["cpu"]["available"]
        best = cast(Backend, "cpu" if compiled else "reference")
        main(cast(Backend, sys.argv[1]), torch.device("cuda"), best)
        torch.cuda.synchronize()
