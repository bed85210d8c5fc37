"""open_clip: the image tower of a CLIP model of the package open_clip (extra `select`), weights from a local file.

    --embedder open_clip --model ViT-B-32 --weights open_clip_model.safetensors

The weights are those of the whole model in open_clip's own naming, .safetensors or .bin; the text tower is left out.
Weights of OpenAI's own training go with the models whose names end in -quickgelu.
"""

import logging
from pathlib import Path
from typing import Any, ClassVar

from data_prep.selection.embedders._network import Loaded, Network, given, put, read_weights
from igpt_ds.errors import UserError

_TOWER = "visual."


class OpenClip(Network):
    """See `data_prep.selection.embedders.Embedder`."""

    name: ClassVar[str] = "open_clip"

    def load(self) -> Loaded:
        """The image tower."""
        import open_clip

        if self.model not in open_clip.list_models():
            raise UserError(f"--model {self.model}: open_clip has no such model: see open_clip.list_models()")
        # It warns that the weights are random, which they are not for long.
        logging.disable(logging.WARNING)
        try:
            # Not the text tower's weights either, which would be downloaded.
            model: Any = open_clip.create_model(self.model, pretrained=None, pretrained_hf=False)
        finally:
            logging.disable(logging.NOTSET)
        state = read_weights(self.weights)
        tower = {name.removeprefix(_TOWER): tensor for name, tensor in state.items() if name.startswith(_TOWER)}
        put(self, model.visual, tower, ())
        pixels = open_clip.get_model_preprocess_cfg(model)
        crop = {"shortest": 1.0, "squash": None}
        if pixels["resize_mode"] not in crop:
            raise UserError(
                f"--model {self.model}: is resized by its {pixels['resize_mode']} side: choose another model"
            )
        size = pixels["size"]
        return Loaded(
            features=model.visual,
            module=model.visual,
            size=size if isinstance(size, int) else size[-1],
            crop=crop[pixels["resize_mode"]],
            filter=pixels["interpolation"],
            mean=tuple(pixels["mean"]),
            std=tuple(pixels["std"]),
        )


def open_embedder(model: str | None, weights: Path | None) -> OpenClip:
    """The embedder; nothing is loaded yet."""
    return OpenClip(*given("open_clip", model, weights, "--model ViT-B-32 --weights open_clip_model.safetensors"))
