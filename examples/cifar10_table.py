"""The fine-tunings of examples/cifar10.sh in one table: test accuracy, mean and standard deviation over the seeds.

python examples/cifar10_table.py OUT > finetuning.md
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

KINDS = {"tuned": "from the autoregressive network", "bert": "from BERT", "scratch": "from random weights"}


def main(out: Path) -> None:
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    votes: dict[tuple[str, int], list[float]] = defaultdict(list)
    images = set()
    for path in sorted(out.glob("*-*-*/result.json")):
        kind, labels, _ = path.parent.name.split("-")
        if kind in KINDS:
            result = json.loads(path.read_text())
            images.add(result["n"])
            found[kind, int(labels)].append(100 * result["accuracy"])
            if result.get("masks"):
                votes[kind, int(labels)].append(100 * result["masks"]["accuracy"])
    columns = sorted({labels for _, labels in found}, key=lambda labels: labels or sys.maxsize)
    seeds = max(map(len, found.values()), default=0)
    print(f"Test accuracy in %, {seeds} seeds, n = {', '.join(map(str, sorted(images)))}; mean ± standard deviation\n")
    print("| labels per class |", " | ".join(str(labels or "all") for labels in columns), "|")
    print("|---|" + "--:|" * len(columns))
    for name, table in ((name, table) for table in (found, votes) for name in KINDS):
        if any((name, labels) in table for labels in columns):
            cells = [_cell(table.get((name, labels), [])) for labels in columns]
            print(f"| {KINDS[name]}{', vote of masks' if table is votes else ''} |", " | ".join(cells), "|")


def _cell(accuracies: list[float]) -> str:
    if not accuracies:
        return ""
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.1f}{spread}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
