"""The run directory: its paths and log, its metrics, the records that evaluations left in it."""
