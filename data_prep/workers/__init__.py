"""The one way in which tasks are run: processes of this machine, or jobs of a Slurm cluster."""
