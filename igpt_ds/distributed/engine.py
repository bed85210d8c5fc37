"""The one door to DeepSpeed: build, step, evaluate; with zero_state.py, the state that a checkpoint holds.

Nothing else in the package imports deepspeed. A process that no launcher started trains too, as the only rank.
"""

import functools
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

# No GPU: say so before DeepSpeed looks for an accelerator of its own choice.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import groups
from torch import Tensor

from igpt_ds.config.batch import Division
from igpt_ds.config.schema import Config
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.distributed.zero_state import ZeroState
from igpt_ds.errors import RunError
from igpt_ds.memory import free_bytes
from igpt_ds.model import attention, classify
from igpt_ds.model.sampling import Drawing, images_at_once, sample
from igpt_ds.model.transformer import Block, ImageGPT, Output, initialise
from igpt_ds.objectives import load_objective

Batch = dict[str, Tensor]
T = TypeVar("T")


class Engine:
    """A model, its optimiser and its ranks.

    Args:
        config: data facts resolved.
        ds: resolved DeepSpeed dictionary (see `igpt_ds.config.deepspeed.resolve`).
        given: names of parameters that are to be read, and so are not drawn.

    Attributes:
        state: what a checkpoint holds.
        measures: the names of what a step and an evaluation measure; the first is the loss.
        attention: the kernel that computes it, see model/attention.py.
    """

    def __init__(
        self, config: Config, ds: dict[str, Any], division: Division, ranks: Ranks, given: Collection[str] = ()
    ):
        self.config, self.division, self.ranks = config, division, ranks
        compiled = config.training.compile is True
        if not compiled:
            # DeepSpeed imports an optimiser that compiles itself: a quarter of the processor time of a rank's start.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Of float32 products on a GPU; bfloat16's are not touched.
        torch.set_float32_matmul_precision("high" if config.training.precision == "tf32" else "highest")
        self.device = ranks.join(config.health.hang_timeout)
        _prepare_deepspeed(ranks, self.device)
        self.stage = int(ds["zero_optimization"]["stage"])
        self.objective = load_objective(config.objective.name)
        self.measures = classify.names(config.finetune) if config.finetune else ("loss",)
        # Under ZeRO-3 each module is divided over the ranks as soon as it is built, and then each parameter is
        # gathered alone to be drawn: no rank ever holds the model. The type comes from `ds`: Init's own dtype
        # argument is overruled by bfloat16 on a device without float16.
        with deepspeed.zero.Init(config_dict_or_path=ds, enabled=self.stage == 3):
            model = ImageGPT(config)
        if self.stage == 3:
            whole = functools.partial(deepspeed.zero.GatheredParameters, modifier_rank=0)
            initialise(model, config.seed, lambda p: whole([p]), given)
            # A block is gathered whole: one collective in place of six, and code without gaps to compile.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        else:
            initialise(model, config.seed, given=given)
        model.to(self.device)
        self.part = slice(None)
        if division.sequence_parallel > 1:
            self.part = _share_positions(model, division.sequence_parallel, ranks)
        if compiled:
            model.compile_blocks()
        self.optimizer = _adam(model, config, self.device)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=ds)
        ranks.wait_patiently(config.health.hang_timeout)  # in DeepSpeed's groups, too: those of all ranks, of hpZ
        if ranks.world == 1 and self.stage < 2 and not hasattr(self.deepspeed.optimizer, "reduce_gradients"):
            # There is nobody to sum up with. Two of DeepSpeed's optimisers need the call also then; where they do not,
            # it copies all gradients, and in bfloat16 rounds what was accumulated in float32.
            self.deepspeed.enable_backward_allreduce = False
        self.module: ImageGPT = self.deepspeed.module
        self.attention = self.module.choose_attention()
        self.state = ZeroState(self.deepspeed, self.optimizer, self.stage, ranks, self.device)
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        assert self.device.type == "cpu" or fused, "DeepSpeed dropped the fused Adam"
        if config.finetune is not None or config.training.weight_decay:
            # Without L_GEN some parameters have no gradient, and get no moments from a step. Of two groups ZeRO-1 and 2
            # link the moments to the parameters when the first has some.
            self.state.create_moments(0)

    # --- one step, one evaluation ------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> tuple[Output, Tensor, Tensor | None]:
        """Run the network on a batch, hiding what the objective hides.

        Args:
            batch: "tokens" [B, T], of any type of integers, and "positions" int64 [B], see loading/loader.py.

        Returns:
            The output, the tokens on the device (int64), and the mask (bool [B, T], or None).
        """
        # Moved and then widened: asked for both, torch widens first, into memory that is not pinned.
        tokens_BT = batch["tokens"].to(self.device, non_blocking=True).to(torch.int64)
        mask_BT = self._mask(tokens_BT, batch["positions"], self.config.seed)
        generative = self.config.finetune is None or self.config.finetune.generative_weight > 0
        return self.deepspeed(tokens_BT, mask_BT, logits=generative), tokens_BT, mask_BT

    def _mask(self, tokens_BT: Tensor, positions_B: Tensor, seed: int) -> Tensor | None:
        return self.objective.mask(tokens_BT, positions_B, seed, self.config.objective.mask_rate)

    def _measure(self, batch: Batch) -> list[Tensor]:
        """Each of `measures` for each image, float32 [B]. A batch to be classified has "labels" int64 [B]."""
        output, tokens_BT, mask_BT = self.forward(batch)
        finetune = self.config.finetune
        if finetune is None:
            assert output.logits_BTK is not None
            return [self.objective.image_losses(output.logits_BTK, tokens_BT, mask_BT, self.part)]
        labels_B = batch["labels"].to(self.device, non_blocking=True)
        return classify.image_measures(output, tokens_BT, mask_BT, labels_B, self.objective, finetune)

    def train_step(self, batches: Iterable[Batch], learning_rate: float) -> tuple[Tensor, float]:
        """One update from this rank's micro-batches; none, on any rank, where the gradient is not finite.

        Returns:
            This rank's mean of each of `measures` (a tensor on the device; the loss in nats), and the global norm of
            the gradient before clipping, the same on every rank (DeepSpeed waits for the device to know it).
        """
        self.deepspeed.train()
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros(len(self.measures), device=self.device)
        norm, depth = 0.0, len(FWD_MODULE_STACK)
        for batch in batches:
            means = [measured_B.mean() for measured_B in self._measure(batch)]
            self.deepspeed.backward(means[0])  # divides by the accumulation
            total += torch.stack(means).detach() / self.division.accumulation
            if self.stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
                norm = self._full_gradient_norm()
                if not math.isfinite(norm):
                    # The other stages skip such an update themselves.
                    self.module.zero_grad(set_to_none=True)
            self.deepspeed.step()
        # ZeRO-3's list of the modules whose forward pass is under way. A recomputation ends as soon as it has what it
        # needs, and leaves its block there: a gigabyte in the two million steps of iGPT-XL.
        del FWD_MODULE_STACK[depth:]
        if self.stage > 0:
            norm = float(self.deepspeed.get_global_grad_norm())
        return total, norm

    def _full_gradient_norm(self) -> float:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[list[float], float]:
        """Sums over the images of each of `measures` (losses in nats), and their number, over all ranks.

        `batches` must count the same on every rank, since a ZeRO-3 forward pass is a collective; rows that only
        fill up a batch have weight 0.

        Raises:
            RunError: what is measured of an image is not finite; on every rank alike.
        """
        self.deepspeed.eval()
        sums_and_count = torch.zeros(len(self.measures) + 1, dtype=torch.float64, device=self.device)
        beyond = torch.iinfo(torch.int64).max
        first = torch.tensor(beyond, device=self.device)  # of the images whose measures are not finite
        for batch in batches:
            weight_B, positions_B = batch["weight"].to(self.device), batch["positions"].to(self.device)
            measured_MB = torch.stack(self._measure(batch))
            sums_and_count += torch.cat([(measured_MB * weight_B).sum(dim=1), weight_B.sum()[None]])
            first = torch.minimum(first, positions_B.where(~measured_MB.isfinite().all(dim=0), beyond).min())
        self.deepspeed.train()
        if (image := self.ranks.least(int(first))) < beyond:
            raise RunError(f"the loss of a held-out image is not finite, first that of image {image}")
        # Ranks that share an image have each counted it, with a loss whose mean over them is the image's.
        *totals, count = self.ranks.sum((sums_and_count / self.division.sequence_parallel).tolist())
        return totals, count

    @torch.no_grad()
    def predict(self, batch: Batch, seeds: Sequence[int]) -> Tensor:
        """The class of each image under the masks of each seed, int64 [len(seeds), B] on the CPU; a collective.

        It is -1 where the scores are not finite.
        """
        self.deepspeed.eval()
        tokens_BT = batch["tokens"].to(self.device, torch.int64)
        found = []
        for seed in seeds:
            mask_BT = self._mask(tokens_BT, batch["positions"], seed)
            scores_BC = self.deepspeed(tokens_BT, mask_BT, logits=False).class_logits_BC
            found.append(scores_BC.argmax(dim=1).where(scores_BC.isfinite().all(dim=1), -1).cpu())
        self.deepspeed.train()
        return torch.stack(found)

    @torch.no_grad()
    def features(self, tokens_BT: Tensor, mask_BT: Tensor | None, layers: Sequence[int], norm: bool) -> list[Tensor]:
        """The layers' pooled features, each float32 [B, D] on the device, see `ImageGPT.forward`; a collective."""
        self.deepspeed.eval()
        mask_BT = None if mask_BT is None else mask_BT.to(self.device)
        found = self.deepspeed(
            tokens_BT.to(self.device, torch.int64), mask_BT, features=layers, logits=False, norm=norm
        ).features
        return [found[layer] for layer in layers]

    @torch.no_grad()
    def sample(self, prefix_BT: Tensor, drawing: Drawing, beat: Callable[[], None] = lambda: None) -> Tensor | None:
        """Complete prefixes (int64 [B, T], see sampling.py), the images divided over the ranks; a collective.

        A step of a divided network gathers all of it for one token. So a copy of it is drawn from, which is whole for
        that time, where every rank has the memory; where one has not, the divided network, all ranks in step.

        Returns:
            int64 [B, n] on rank 0, None on the others; None on all where a rank lacks the memory for a single image.
        """
        self.deepspeed.eval()
        weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.module.parameters())
        # The same on every rank, so that all go the same way and take the same number of steps.
        free = self.ranks.least(free_bytes(self.device, self.ranks.neighbours) // 2)
        model, network = self.module, None
        if self.stage == 3 and free < weights:
            network = self.deepspeed
        elif self.stage == 3:
            model, free = self._whole_copy(), free - weights
        images = images_at_once(model, free)

        def draw_rows(prefix_BT: Tensor, first: int) -> Tensor:
            parts = [
                sample(model, prefix_BT[i : i + images], drawing, first + i, None, network, beat)
                for i in range(0, len(prefix_BT), images)
            ]
            return torch.cat(parts)

        found = self.ranks.share_rows(draw_rows, prefix_BT) if images else None
        self.deepspeed.train()
        return found

    def _whole_copy(self) -> ImageGPT:
        """The network as it stands under ZeRO-3, whole on every rank and in evaluation mode; a collective."""
        weights = {}
        for name, p in self.module.named_parameters():
            # Small parameters are kept whole, and would not be any more when such a context ends.
            divided = p.numel() < getattr(p, "ds_numel", 0)
            with deepspeed.zero.GatheredParameters([p]) if divided else nullcontext():
                weights[name] = p.detach().clone()
        with torch.device("meta"):
            model = ImageGPT(self.config)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def close(self) -> None:
        """Free the model and its optimiser; the process group stays (see `Ranks.leave`)."""
        self.deepspeed.destroy()
        attention.leave()
        # hpZ's groups stay, and DeepSpeed fails where a second engine would make them again.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def _prepare_deepspeed(ranks: Ranks, device: torch.device) -> None:
    """Give DeepSpeed the process group that the ranks have; once a process."""
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the device
    else:
        # Its shared-memory collectives would be compiled for minutes and leave files in /dev/shm; gloo serves.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed asks for the number of "devices" at every gradient bucket, and without this asks numactl.
        os.environ.setdefault("LOCAL_SIZE", str(ranks.neighbours))
    deepspeed.init_distributed(verbose=False)


def _share_positions(model: ImageGPT, sharing: int, ranks: Ranks) -> slice:
    """Let `sharing` neighbouring ranks share an image's positions (DeepSpeed Ulysses); this rank's."""
    groups = [dist.new_group(range(first, first + sharing)) for first in range(0, ranks.world, sharing)]

    def between_ranks(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        distributed = DistributedAttention(attend, groups[ranks.rank // sharing], scatter_idx=2, gather_idx=1)
        return functools.partial(distributed, batch_dim_idx=0)

    share = model.sequence_length // sharing
    part = slice(ranks.rank % sharing * share, (ranks.rank % sharing + 1) * share)
    model.share_positions(part, between_ranks)
    return part


def _adam(model: ImageGPT, config: Config, device: torch.device) -> torch.optim.AdamW:
    """Adam (paper section 3.4), as a rule without weight decay: fused on a GPU, torch's plain one on a CPU."""
    decay = config.training.weight_decay
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if decay:
        free = [p for name, p in model.named_parameters() if name.endswith(("gain", "bias"))]
        decayed = [p for name, p in model.named_parameters() if not name.endswith(("gain", "bias"))]
        groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=config.training.learning_rate,
        betas=(config.training.beta1, config.training.beta2),
        eps=config.training.epsilon,
        weight_decay=decay,
        fused=device.type == "cuda",
    )
