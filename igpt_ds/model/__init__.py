"""The network as the paper has it, and the drawing of tokens from it."""
