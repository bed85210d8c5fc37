"""The state of a training on the disk: written and published, verified and read, surveyed."""
