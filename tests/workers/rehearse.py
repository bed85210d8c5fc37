"""One rank, real or played, that is measured: `python -m tests.workers.rehearse FOLDER [played]`, started by ranks.py.

The same network at each ZeRO stage, on 2 ranks. Recorded in FOLDER, judged by tests/igpt_ds/rehearse/test_ranks.py.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.helpers.ranks import record_and_end

WORLD = 2
SHAPE = ["model.width=128", "model.layers=4", "model.heads=4", "data.resolution=8", "data.palette_size=64"]
NAMES = ("zero0", "zero1", "zero2", "zero3")


def main() -> None:
    """All stages in turn, in one process group."""
    from igpt_ds.distributed.device import at_hand
    from igpt_ds.distributed.ranks import launched
    from igpt_ds.rehearse.job import Request, prepare
    from igpt_ds.rehearse.measure import measure
    from igpt_ds.rehearse.ranks import PlayedRanks

    folder, played = Path(sys.argv[1]), sys.argv[2:] == ["played"]
    records: dict[str, Any] = {}
    ranks = PlayedRanks(0, WORLD) if played else launched()
    for name in NAMES:
        request = Request("tiny", SHAPE, name, nodes=1, gpus_per_node=WORLD)
        measured = measure(prepare(request, at_hand(ranks)).here, ranks, 1, lambda line: None)
        phases = {phase: asdict(at) for phase, at in measured.watched.phases.items()}
        records[name] = {"stays": measured.stays, "peak": measured.peak, "kinds": measured.kinds, "phases": phases}
        records[name]["part"] = measured.part
    record_and_end(folder, ranks, records)


if __name__ == "__main__":
    main()
