"""timm: the pooled features of an image model of the package timm (extra `select`), with weights from a local file.

    --embedder timm --model vit_small_patch14_dinov2.lvd142m --weights dinov2_small.safetensors

The weights are those that the package publishes for the model, .safetensors or .pth; the classifier is left out.
"""

from pathlib import Path
from typing import Any, ClassVar

from data_prep.selection.embedders._network import Loaded, Network, given, put, read_weights
from igpt_ds.errors import UserError


class Timm(Network):
    """See `data_prep.selection.embedders.Embedder`."""

    name: ClassVar[str] = "timm"

    def load(self) -> Loaded:
        """The model without its classifier."""
        import timm

        if not timm.is_model(self.model):
            raise UserError(f"--model {self.model}: timm has no such model: see timm.list_models()")
        model: Any = timm.create_model(self.model, pretrained=False, num_classes=0)
        classifier = model.pretrained_cfg.get("classifier") or ()
        put(self, model, read_weights(self.weights), (classifier,) if isinstance(classifier, str) else classifier)
        pixels = timm.data.resolve_model_data_config(model)
        crop = {"center": pixels["crop_pct"], "squash": None}
        if pixels["crop_mode"] not in crop:
            raise UserError(f"--model {self.model}: is cropped by {pixels['crop_mode']}: choose another model")
        return Loaded(
            features=model,
            module=model,
            size=pixels["input_size"][-1],
            crop=crop[pixels["crop_mode"]],
            filter=pixels["interpolation"],
            mean=pixels["mean"],
            std=pixels["std"],
        )


def open_embedder(model: str | None, weights: Path | None) -> Timm:
    """The embedder; nothing is loaded yet."""
    return Timm(*given("timm", model, weights, "--model vit_small_patch14_dinov2.lvd142m --weights FILE.safetensors"))
