"""Which weights ZeRO-3 gathers in a step, and how many it holds at one time: DeepSpeed's rules played through.

DeepSpeed 0.19 learns in which order modules are used, and then, whenever a module is entered (partitioned_param_
coordinator.py):

1. gathers what of its parameters is not there;
2. goes on through the order from where it stopped and gathers what is not there, until `stage3_prefetch_bucket_size`
   elements are on their way or `stage3_max_live_parameters` are there;
3. and when the module is left, lets go of its parameters, unless they are used again within
   `stage3_max_reuse_distance` elements, or step 2 has come upon that next use already and found them still there.

What is gathered at once comes in one message. All of it is copied out when the first of its parameters is waited for,
and the message is held until the last of them is: up to a bucket more than the parameters. (In which order a module's
are waited for is chance; the most is counted.)

A block is one module here, entered and left whole (engine.py). Parameters of up to `stage3_param_persistence_threshold`
elements stay, and are gathered once after every update.
"""

import itertools
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from igpt_ds.planner.layout import Layout, Sizes, module_sizes

Module = tuple[int, str]  # layer, name; -1 before, -2 after the blocks
Parameter = tuple[Module, int]


@dataclass(frozen=True)
class Rules:
    """The four numbers of the DeepSpeed configuration, in elements."""

    prefetch: int
    max_live: int
    reuse_distance: int
    persistence: int


@dataclass(frozen=True)
class Gathering:
    """Elements gathered in one forward and one backward pass, and after an update; and most held at one time.

    Attributes:
        live, live_backward: in both passes, and in the backward pass.
    """

    forward: int = 0
    backward: int = 0
    small: int = 0
    live: int = 0
    live_backward: int = 0


@dataclass
class _Message:
    """Parameters that one message brings; once one of them is used, all are copied out of it.

    It is there until the last of them is used.
    """

    size: int
    unused: set[Parameter]
    copied: bool = False


def gathering(layout: Layout) -> Gathering:
    """What a ZeRO-3 job gathers; one rank has it all."""
    if layout.ranks == 1:
        return Gathering()
    rules = Rules(
        prefetch=layout.option("stage3_prefetch_bucket_size", 50_000_000),
        max_live=layout.option("stage3_max_live_parameters", 10**9),
        reuse_distance=layout.option("stage3_max_reuse_distance", 10**9),
        persistence=layout.option("stage3_param_persistence_threshold", 100_000),
    )
    return play(module_sizes(layout.config), layout.config.model.layers, layout.recomputed, rules)


@lru_cache(maxsize=64)
def play(sizes: Sizes, layers: int, recomputed: range, rules: Rules) -> Gathering:
    """One forward and one backward pass.

    Args:
        recomputed: the blocks that are computed again in the backward pass.
    """
    parameters = _parameters(sizes, layers)
    uses, forward = _uses(sizes, layers, recomputed)
    small = sum(n for parts in parameters.values() for n in parts if n <= rules.persistence)
    divided = {
        module: {(module, i): n for i, n in enumerate(parts) if n > rules.persistence}
        for module, parts in parameters.items()
    }
    passed = [0, *itertools.accumulate(sum(parameters[module]) for module, _ in uses)]
    again = _next_uses(uses)
    queue = deque((step, p, n) for step, (module, _) in enumerate(uses) for p, n in divided[module].items())
    there: set[Parameter] = set()
    fetched: dict[Parameter, int] = {}  # the latest use that step 2 has come upon
    on_way: dict[Parameter, _Message] = {}
    live = held = 0  # elements of parameters that count as there, and that take memory
    gathered, most = [0, 0], [0, 0]  # in each pass

    def send(parts: dict[Parameter, int], at: int) -> None:
        nonlocal live, held
        size = sum(parts.values())
        on_way.update(dict.fromkeys(parts, _Message(size, set(parts))))
        there.update(parts)
        gathered[at] += size
        live += size
        held += size
        most[at] = max(most[at], held)

    def use(module: Module, at: int) -> None:
        nonlocal held
        came = {p: on_way.pop(p) for p in divided[module] if p in on_way}
        for message in came.values():
            held += 0 if message.copied else message.size
            message.copied = True
        most[at] = max(most[at], held)
        for p, message in came.items():
            message.unused.remove(p)
            held -= 0 if message.unused else message.size

    for step, (module, left) in enumerate(uses):
        at = int(step >= forward)
        send({p: n for p, n in divided[module].items() if p not in there}, at)
        use(module, at)
        for _ in [p for p in divided[module] if fetched.get(p, -1) < step]:
            later, p, _ = queue.popleft()
            fetched[p] = later
        wanted, ahead = min(rules.max_live - live, rules.prefetch), dict[Parameter, int]()
        while queue and wanted > 0:
            later, p, n = queue.popleft()
            if p not in there and p not in ahead:
                ahead[p] = n
                wanted -= n
            fetched[p] = max(fetched.get(p, -1), later)
        send(ahead, at)
        for gone in left:
            following = again.get((step, gone))
            near = following is not None and passed[following] - passed[step + 1] < rules.reuse_distance
            for p, n in divided[gone].items():
                if p in there and not near and fetched.get(p, -1) <= step + 1:
                    there.remove(p)
                    live -= n
                    held -= n
    return Gathering(gathered[0], gathered[1], small, max(most) + small, most[1] + small)


def _parameters(sizes: Sizes, layers: int) -> dict[Module, tuple[int, ...]]:
    found: dict[Module, tuple[int, ...]] = {(-1, "network"): sizes.root}
    found |= {(layer, "block"): sizes.block for layer in range(layers)}
    return found | {(-2, name): (n,) for name, n in zip(_AFTER, sizes.after, strict=False)}


_AFTER = ("norm", "head", "class_head")


def _uses(sizes: Sizes, layers: int, recomputed: range) -> tuple[list[tuple[Module, tuple[Module, ...]]], int]:
    """Each entry of a module with the modules that are left before the next; and the number of the forward pass's."""
    network: Module = (-1, "network")
    after = [(-2, name) for name, _ in zip(_AFTER, sizes.after, strict=False)]
    blocks: list[Module] = [(layer, "block") for layer in range(layers)]
    order: list[tuple[Module, tuple[Module, ...]]] = [(network, ()), *((block, (block,)) for block in blocks)]
    order += [(module, (module,)) for module in after]
    order[-1] = (after[-1], (after[-1], network))
    forward = len(order)
    order += [(network, ()), *((module, (module,)) for module in after[::-1])]
    for block in reversed(blocks):
        if block[0] in recomputed:
            # Entered by its backward pass, which then asks for what is computed again.
            order.append((block, ()))
        order.append((block, (block,)))
    return order, forward


def _next_uses(uses: list[tuple[Module, tuple[Module, ...]]]) -> dict[tuple[int, Module], int]:
    """(step at whose end a module is left, module) -> the step that enters it next."""
    found, following = {}, dict[Module, int]()
    for step in range(len(uses) - 1, -1, -1):
        for module in uses[step][1]:
            # Looking for a block's next use, DeepSpeed takes all parameters within the network for the network's own.
            names = [module, (-1, "network")] if module[1] == "block" else [module]
            nearest = [following[name] for name in names if name in following]
            if nearest:
                found[step, module] = min(nearest)
        following[uses[step][0]] = step
    return found
