"""Tables 1 to 5 of the paper with one's own runs below its rows: recorded figures, or the word missing.

The paper's rows stand as printed. Own rows carry n, the number of images that a figure rests on; with the test split
where it was reported, else with the validation split, and say which.
"""

from collections.abc import Sequence

from igpt_ds.config.size import parameter_count
from igpt_ds.evals import Record
from igpt_ds.results import paper_numbers as paper
from igpt_ds.results.records import RunRecords, best_layer
from igpt_ds.text import MISSING, Table, percent

Runs = Sequence[RunRecords]
PAPER, OURS = "paper", "this run"


def all_tables(runs: Runs) -> list[Table]:
    """Tables 1 to 5, in their order."""
    return [table_1(runs), table_2(runs), table_3(runs), table_4(runs), table_5(runs)]


def probed(probe: Record, result: Record | None = None) -> tuple[str, str]:
    """Accuracy of a probe's best layer (or of another `result` of it) as per cent, and "n split"."""
    test = (result or probe).get("test")
    if test:
        return percent(test["accuracy"]), f"{test['n']:,} test"
    result = result or best_layer(probe)
    n = result.get("n") or probe.get("validation_images")
    return percent(result["accuracy"]), f"{n:,} val" if n else ""


def resolution(run: RunRecords) -> str:
    """The input resolution as the paper writes it."""
    return f"{run.config.data.resolution or '?'}²·3"


def probes_of(run: RunRecords) -> str:
    """The data that a run was probed on, by its folder's name."""
    data = (run.probe or {}).get("data")
    return str(data).rstrip("/").rpartition("/")[2] if data else run.data


def table_1(runs: Runs) -> Table:
    """Linear probes, one row a data set and model."""
    rows = [[*row[:3], "", row[3], PAPER] for row in paper.TABLE_1]
    for run in pretrainings(runs):
        accuracy, n = probed(run.probe) if run.probe else (MISSING, "")
        layer = f", layer {best_layer(run.probe)['layer']}" if run.probe else ""
        rows.append([probes_of(run), f"{run.label}{layer}", accuracy, n, "pre-trained", OURS])
    headings = ["data", "model", "accuracy, %", "n", "ImageNet transfer", "from"]
    return Table("Table 1: linear probes", headings, rows)


def table_2(runs: Runs) -> Table:
    """Linear probes by size: best layer, and concatenated layers where they were recorded."""
    rows = [[*row, "", PAPER] for row in paper.TABLE_2]
    for run in pretrainings(runs):
        width = run.config.model.width
        size = [run.label, resolution(run), f"{parameter_count(run.config) / 1e6:.3g}"]
        results = [probed(run.probe)] if run.probe else [(MISSING, "")]
        rows += [[*size, str(width), *result, OURS] for result in results]
        for several in (run.probe or {}).get("concatenation") or []:
            features = str(width * len(several["layers"]))
            rows.append([*size, features, *probed(run.probe or {}, several), OURS])
    headings = ["method", "input", "params (M)", "features", "accuracy, %", "n", "from"]
    note = "The paper's rows are of ImageNet; this run's are of its own data."
    return Table("Table 2: linear probes on ImageNet", headings, rows, note)


def table_3(runs: Runs) -> Table:
    """Fine-tuning, and training from scratch."""
    rows = [[*row[:3], "", row[3], PAPER] for row in (*paper.TABLE_3, *paper.FINETUNED_OTHERS)]
    for run in (run for run in runs if run.config.finetune):
        scratch = "none" if from_scratch(run) else "pre-trained"
        accuracy, n = percent(None), ""
        if run.result:
            accuracy, n = percent(run.result["accuracy"]), f"{run.result['n']:,} {run.result.get('split') or 'val'}"
        few = run.config.finetune and run.config.finetune.labels
        model = f"{run.label}, {few} labels a class" if few else run.label
        rows.append([run.data, model, accuracy, n, scratch, OURS])
    if not any(run.config.finetune for run in runs):
        rows.append([MISSING, "no fine-tuning given", MISSING, "", "", OURS])
    headings = ["data", "model", "accuracy, %", "n", "ImageNet transfer", "from"]
    return Table(
        "Table 3: fine-tuning", headings, rows, "The ImageNet rows are those of section 4.5, few labels of 4.7."
    )


def table_4(runs: Runs) -> Table:
    """Errors with few labels."""
    counts = {int(key) for run in runs for key in (run.low_data or {}).get("labels_per_class", {})}
    columns = sorted(counts | set(paper.TABLE_4_LABELS))
    rows = []
    for model, errors in paper.TABLE_4:
        printed = dict(zip(paper.TABLE_4_LABELS, errors, strict=True))
        rows.append([model, *(printed.get(count, "") for count in columns), "5", "", PAPER])
    for run in pretrainings(runs):
        found = (run.low_data or {}).get("labels_per_class", {})
        mine = {int(count): result for count, result in found.items()}
        cells = [_error(mine.get(count)) for count in columns]
        subsets = sorted({len(result["accuracies"]) for result in mine.values()})
        images = sorted({result["n"] for result in mine.values()})
        split = f" {(run.low_data or {}).get('split') or 'val'}" if images else ""
        counted = [", ".join(f"{n:,}" for n in numbers) for numbers in (subsets, images)]
        rows.append([run.label, *cells, counted[0], counted[1] + split, OURS])
    headings = ["model", *(f"{count} a class" for count in columns), "subsets", "n", "from"]
    note = "Error in %, mean ± standard deviation over random subsets. The paper's are of CIFAR-10."
    return Table("Table 4: few labels", headings, rows, note)


def _error(result: Record | None) -> str:
    return MISSING if result is None else f"{100 * (1 - result['mean']):.1f} ± {100 * result['std']:.1f}"


def table_5(runs: Runs) -> Table:
    """Learning rates, and for own runs the loss that they led to."""
    rows = [[*row, "", "", "", PAPER] for row in paper.TABLE_5]
    for run in pretrainings(runs):
        loss, n = MISSING, ""
        if run.validation:
            nats, images = run.validation[max(run.validation)]
            loss, n = f"{nats:.4f}", f"{images:,}"
        rate = f"{run.config.training.learning_rate:g}"
        tried = ", ".join(f"{trial['rate']:g}" for trial in (run.sweep or {}).get("rates", []))
        if run.sweep:
            end = run.sweep.get("edge")
            tried += f": best {run.sweep.get('winner') or 'none'}{f', the {end}' if end else ''}"
        rows.append([run.label, run.objective, resolution(run), rate, tried, loss, n, OURS])
    headings = ["model", "objective", "input", "learning rate", "searched", "validation loss, nats", "n", "from"]
    note = "The paper searched 0.01, 0.003, 0.001, ... until the final validation loss rose, and names the best."
    return Table("Table 5: learning rates", headings, rows, note)


def pretrainings(runs: Runs) -> list[RunRecords]:
    """The runs that are no fine-tunings."""
    return [run for run in runs if run.config.finetune is None]


def from_scratch(run: RunRecords) -> bool:
    """Whether a fine-tuning began with random weights."""
    return run.config.finetune is not None and not run.config.init_from
