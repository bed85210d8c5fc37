"""Real faults for real runs: kills, stopped ranks, hangs, damaged files, full disks, non-finite numbers."""
