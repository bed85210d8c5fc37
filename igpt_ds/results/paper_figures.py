"""Figures 2, 3 and 4 of the paper: one's own runs on the left, what it printed on the right.

Drawn from records alone. What has no record is named in the picture as missing; of the paper only numbers are
drawn that it printed. Accuracies are per cent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from igpt_ds.evals import Record
from igpt_ds.plots import by_layer, new, plain
from igpt_ds.results import paper_numbers as paper
from igpt_ds.results.paper_tables import probes_of
from igpt_ds.results.records import RunRecords, best_layer

# The paper's colours of figure 4: bold is what ensembling masks adds.
PROBE, PROBE_BOLD, TUNED, TUNED_BOLD = "#9ecae1", "#1f6fb4", "#fdbe85", "#e6550d"


@dataclass(frozen=True)
class Score:
    """What one bar of figure 4 shows, in per cent: an accuracy of `n` images, and that of the vote of masks."""

    accuracy: float
    masks: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Bars:
    """A group of figure 4; None where there is no record."""

    name: str
    probe: Score | None
    tuned: Score | None


def figure_2(runs: Sequence[RunRecords]) -> Figure:
    """Probe accuracy by layer."""
    figure, own, theirs = _beside("Figure 2: representation quality by layer")
    probes = [(run, probe) for run in runs if (probe := run.probe)]
    for number, (run, probe) in enumerate(probes):
        label = f"{plain(run.label)}, {_probed_on(run, probe)}, {probe['step']:,} steps"
        by_layer(own, probe["layers"], "o-", f"C{number}", label)
    _conclude(own, bool(probes), "no probe.json in these runs")
    for place, (_, value, derived) in enumerate(paper.FIGURE_2):
        _bar(theirs, place, 0.8, Score(value), PROBE if derived else PROBE_BOLD, note="\nderived" if derived else "")
    _name_bars(theirs, [name for name, *_ in paper.FIGURE_2])
    theirs.set_title("the paper's iGPT-L: what its text states")
    return figure


def figure_3(runs: Sequence[RunRecords]) -> Figure:
    """Probe accuracy against validation loss, a line a run and a point a checkpoint."""
    figure, own, theirs = _beside("Figure 3: representation quality by generative loss")
    drawn = 0
    for run in runs:
        losses = run.validation
        probes = [p for p in run.probes if p["step"] in losses and math.isfinite(losses[p["step"]][0])]
        probes = [p for p in probes if p.get("data") == probes[-1].get("data")]  # one line is of one data set
        points = [(losses[p["step"]][0], 100 * best_layer(p)["accuracy"], p) for p in probes]
        if not points:
            continue
        label = f"{plain(run.label)}, {_probed_on(run, points[-1][2])}"
        own.plot([nats for nats, *_ in points], [a for _, a, _ in points], "o-", color=f"C{drawn}", label=label)
        for nats, accuracy, probe in points:
            step = f"{probe['step']:,}"
            own.annotate(step, (nats, accuracy), xytext=(5, -10), textcoords="offset points", fontsize="x-small")
        drawn += 1
    own.set_xlabel("validation loss, nats a token (points: steps)")
    own.invert_xaxis()
    own.margins(0.1)
    own.grid(alpha=0.3)
    _conclude(own, drawn > 0, "no step has both a probe record\nand a validation loss")
    for name, nats, accuracy in paper.FIGURE_3:
        theirs.plot(nats, accuracy, "o", color=PROBE_BOLD)
        label = f"{name}, {accuracy}"
        theirs.annotate(label, (nats, accuracy), xytext=(-8, -4), textcoords="offset points", ha="right")
    theirs.set_xlim(2.115, 2.035)
    theirs.margins(y=0.15)
    theirs.set_xlabel("test loss of the released checkpoints, nats a token")
    theirs.set_ylabel("accuracy on ImageNet, %")
    theirs.set_title("ImageNet probes of the last step (section 4.4);\nnot figure 3's, which lie above 90 %")
    theirs.grid(alpha=0.3)
    return figure


def figure_4(runs: Sequence[RunRecords]) -> Figure:
    """Auto-regressive against BERT: probe and fine-tuning; bold is what ensembling masks changes."""
    figure, own, theirs = _beside("Figure 4: auto-regressive and BERT pre-training")
    split = split_of(runs)
    groups = groups_of(runs, split)
    _draw_groups(own, groups, "no record")
    own.set_title(f"these runs, {'test' if split == 'test' else 'validation'} images")
    _conclude(own, bool(groups), "no probe.json or result.json in these runs", columns=2)
    printed = [[None if value is None else Score(value) for value in row[1:]] for row in paper.FIGURE_4]
    named = zip(paper.FIGURE_4, printed, strict=True)
    _draw_groups(theirs, [Bars(row[0], *scores) for row, scores in named], "not printed")
    theirs.set_title("the paper's iGPT-L, 32²")
    theirs.set_xlabel(paper.FIGURE_4_TEXT, fontsize="x-small")
    return figure


def split_of(runs: Sequence[RunRecords]) -> str:
    """What all bars of figure 4 are of: the test split where all of them have a result on it, else val, which all have.

    An accuracy that settings were chosen by flatters, so one of each would not compare.
    """
    tested = [bool(run.probe.get("test")) for run in runs if run.probe and run.config.finetune is None]
    tested += [run.result.get("split") == "test" for run in runs if run.result and _compares(run)]
    return "test" if tested and all(tested) else "val"


def groups_of(runs: Sequence[RunRecords], split: str) -> list[Bars]:
    """Groups of figure 4: one a pre-training with its best fine-tuning, one a fine-tuning of none of the runs.

    A fine-tuning belongs to the run whose checkpoint it began with.
    """
    homes = {run.label: run.path.resolve() for run in runs if run.config.finetune is None}
    tuned: dict[str, list[Score]] = {}
    for run in runs:
        if _compares(run) and run.result and (score := _tuned(run.result, split)):
            begun = Path(run.config.init_from).resolve() if run.config.init_from else None
            home = next((label for label, path in homes.items() if begun and path in begun.parents), run.label)
            tuned.setdefault(home, []).append(score)
    groups = []
    for run in runs:
        best = max(tuned.get(run.label, []), key=lambda score: score.accuracy, default=None)
        probe = _probed(run.probe, split) if run.probe and run.config.finetune is None else None
        if best is None and probe is None:
            continue
        scratch = run.config.finetune is not None and not run.config.init_from
        groups.append(Bars(f"{plain(run.label)}\n{'from scratch' if scratch else run.objective}", probe, best))
    return groups


def _compares(run: RunRecords) -> bool:
    """Whether a run is a fine-tuning of all labels."""
    return run.config.finetune is not None and not run.config.finetune.labels


def _probed(probe: Record, split: str) -> Score | None:
    if split == "test":
        return _score(probe["test"], probe["test"]) if probe.get("test") else None
    best = best_layer(probe)
    return _score({**best, "n": best.get("n") or probe["validation_images"]}, probe)


def _tuned(result: Record, split: str) -> Score | None:
    """A result on test/ keeps the best accuracy on val/ beside it, but not that of the vote there."""
    if result.get("split", "val") == split:
        return _score(result, result)
    return _score(result["validation"], {}) if split == "val" and result.get("validation") else None


def _score(found: Record, masked: Record) -> Score:
    masks = masked.get("masks")
    vote = 100 * masks["accuracy"] if isinstance(masks, dict) and "accuracy" in masks else None
    return Score(100 * found["accuracy"], vote, found["n"])


def _beside(title: str) -> tuple[Figure, Axes, Axes]:
    figure = new(11, 4.4)
    own, theirs = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title)
    own.set_title("these runs")
    own.set_ylabel("accuracy, %")
    return figure, own, theirs


def _conclude(axes: Axes, drawn: bool, otherwise: str, columns: int = 1) -> None:
    if drawn:
        axes.legend(fontsize="small", ncols=columns)
    else:
        axes.text(0.5, 0.5, f"missing: {otherwise}", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])


def _draw_groups(axes: Axes, groups: Sequence[Bars], missing: str) -> None:
    for place, group in enumerate(groups):
        for x, score, color, bold in (
            (place - 0.2, group.probe, PROBE, PROBE_BOLD),
            (place + 0.2, group.tuned, TUNED, TUNED_BOLD),
        ):
            _bar(axes, x, 0.38, score, color, bold, missing)
    # Drawn outside of the axes, for the legend alone.
    kinds = [("linear probe", PROBE, True), ("fine-tuned", TUNED, True)]
    probes, tuned = [group.probe for group in groups], [group.tuned for group in groups]
    kinds.append(("probe, masks ensembled", PROBE_BOLD, any(score and score.masks for score in probes)))
    kinds.append(("fine-tuned, masks ensembled", TUNED_BOLD, any(score and score.masks for score in tuned)))
    for label, color, shown in kinds:
        if shown:
            axes.bar(-9, 0, color=color, label=label)
    _name_bars(axes, [group.name for group in groups])
    axes.set_xlim(-0.6, max(len(groups), 2) - 0.4)


def _bar(
    axes: Axes,
    x: float,
    width: float,
    score: Score | None,
    color: str,
    bold: str = "",
    missing: str = "",
    note: str = "",
) -> None:
    if score is None:
        axes.text(x, 1, missing, rotation=90, ha="center", va="bottom", fontsize="x-small", color="C7")
        return
    value, masks = score.accuracy, score.masks
    axes.bar(x, value, width, color=color)
    top, text = value, f"{value:.1f}{note}"
    if masks is not None:
        # A loss is drawn as well: the bold part then lies within the bar.
        axes.bar(x, abs(masks - value), width, bottom=min(masks, value), color=bold)
        top, text = max(masks, value), f"{value:.1f}\n→ {masks:.1f}"
    axes.text(x, top + 0.5, text, ha="center", va="bottom", fontsize="small")
    if score.n:  # within the bar, or above the number where the bar is too low
        y = 2 if value > 40 else top + (8 if masks is None else 15)
        axes.text(x, y, f"n = {score.n:,}", rotation=90, ha="center", va="bottom", fontsize="x-small")


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(0, 132)
    axes.set_yticks(range(0, 101, 20))


def _probed_on(run: RunRecords, probe: Record) -> str:
    return f"{plain(probes_of(run)) or 'unknown data'} (n = {probe['validation_images']:,})"
