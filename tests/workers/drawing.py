"""igpt-ds, which tells how many tensors of random numbers it has drawn: `python -m tests.workers.drawing WORDS`."""

from typing import Any

import torch

from igpt_ds.cli import main

drawn: list[torch.Tensor] = []
_draw = torch.Tensor.normal_


def _kept(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    drawn.append(tensor)
    return _draw(tensor, *arguments, **options)


if __name__ == "__main__":
    torch.Tensor.normal_ = _kept  # type: ignore[method-assign,assignment]
    try:
        main()
    finally:
        print(f"drawn: {len(drawn)}", flush=True)
