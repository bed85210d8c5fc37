"""Files as they were published: near or far, in tars, pickles and archives of arrays; nothing in them is trusted."""

MAX_BYTES = 64 << 20  # no photograph's file is larger; of one no more is read than a byte beyond this
