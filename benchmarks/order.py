"""How long a lookup in the sample order takes. Run by hand: `python benchmarks/order.py`.

The targets: in a source of 100 million rows the first lookup takes less than 0.2 s and a later one less than
20 microseconds on average over a sequential stream, the crossings of windows included.
"""

import statistics
import time

from igpt_ds.loading.order import Order, SourceRows

ROWS_PER_SHARD = 16_384
WEB = SourceRows("web", ((ROWS_PER_SHARD, 0),) * 6_104)
IMAGENET = SourceRows("imagenet", ((ROWS_PER_SHARD, 0),) * 75)
LATER = 1_000_000


def first_seconds(sources: list[SourceRows], position: int) -> float:
    """Construct the order and look one position up."""
    begin = time.perf_counter()
    Order(1, sources)(position)
    return time.perf_counter() - begin


def later_seconds(sources: list[SourceRows]) -> float:
    """Mean over a sequential stream that begins in the middle of the source."""
    order = Order(1, sources)
    start = 50_000_000
    order(start)
    begin = time.perf_counter()
    for position in range(start + 1, start + 1 + LATER):
        order(position)
    return (time.perf_counter() - begin) / LATER


def main() -> None:
    """Print the table."""
    print(f"{'sources':<16} {'rows':>12} {'first lookup, ms':>17} {'later, mean us':>15}")
    for sources in ([IMAGENET], [WEB], [WEB, IMAGENET]):
        rows = sum(rows for source in sources for rows, _ in source.shards)
        first = statistics.median(first_seconds(sources, rows // 10 * k) for k in range(5))
        name = " + ".join(source.name for source in sources)
        print(f"{name:<16} {rows:>12,} {first * 1e3:>17.1f} {later_seconds(sources) * 1e6:>15.2f}")


if __name__ == "__main__":
    main()
