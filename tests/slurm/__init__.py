"""The job scripts on a real Slurm: a controller and three simulated nodes on this machine (see cluster.sh)."""
