"""Is this machine, this job, fit to run? What is looked at and held against what a run needs.

Each rank reads facts (`read_...`: a dictionary that fits into JSON), rank 0 judges them (`judge_...`: pure, facts to
`report.Check`). Reading may fail in any way and never stops a rank: what goes wrong becomes a FAIL.

    report.py    a check, many ranks' checks as one, the table
    machine.py   versions, stale locks, memory, limits
    devices.py   GPUs
    disk.py      speed, space and clock of the run directory's file system
    inputs.py    configuration, data, run directory
    speed.py     matrix multiplication and all-reduce, and who is slow
    ranks.py     how the ranks meet without ever waiting for ever
    examine.py   all of it, in order
"""
