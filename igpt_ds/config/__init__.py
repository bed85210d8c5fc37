"""The configuration of a run: fields, TOML in and out, what must hold; DeepSpeed's JSON; arithmetic of size."""
