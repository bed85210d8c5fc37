"""Pictures that a model draws, and the sheets that they are shown on."""
