"""Image GPT at full scale: training and evaluation of "Generative Pretraining from Pixels" (Chen et al. 2020).

    model = igpt_ds.load("runs/s")

`igpt_ds.api` has what can be asked of it; docs/api.md shows it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igpt_ds.api import Features, Model, evaluate, load, pretrain

__version__ = "0.1.0"
__all__ = ["Features", "Model", "__version__", "evaluate", "load", "pretrain"]


def __getattr__(name: str) -> Any:
    # Torch is loaded when the first of these is asked for, not by the import.
    if name in __all__:
        from igpt_ds import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
