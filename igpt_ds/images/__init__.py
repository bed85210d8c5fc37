"""From an image file to a small square of pixels: for the shards, and for images that a model is given."""

MAX_BYTES = 64 << 20  # no photograph's file is larger; of one no more is read than a byte beyond this
