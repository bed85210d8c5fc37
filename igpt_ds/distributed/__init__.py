"""The ranks and how they meet; the engine, which is the only door to DeepSpeed."""
