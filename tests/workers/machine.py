"""A training whose ranks find another free memory each: `python -m tests.workers.machine BYTES,... pretrain ...`."""

import os
import sys

from igpt_ds import cli
from igpt_ds.distributed import device


def main() -> None:
    readings = [int(text) for text in sys.argv[1].split(",")]
    device.free_bytes = lambda *_: readings[int(os.environ["RANK"])]  # type: ignore[assignment]
    sys.argv = ["igpt-ds", *sys.argv[2:]]
    cli.main()


if __name__ == "__main__":
    main()
