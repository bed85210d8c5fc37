"""The format of a dataset directory, where data_prep and igpt_ds meet: NumPy and the standard library only."""
