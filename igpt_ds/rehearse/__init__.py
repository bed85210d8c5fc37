"""One rank of a big job on the device that is here, the other ranks played: does it fit, and how fast is it?

    run.py       from the options to the record
    job.py       the job on its machines, and a rank of it here
    ranks.py     one rank of many, alone: torch's fake process group
    watch.py     one step seen from within: bytes by phase, and when the device was busy
    measure.py   the real engine: built, stepped, saved
    report.py    what was measured beside what was planned, as JSON and as tables

Collectives of the fake group return at once, with what this rank gave in place of what the others would have given. So
weights, losses and gradients mean nothing, and are not shown; but shapes, memory, kernels, hooks and the host's work
are those of the real rank. What the network would take is the planner's.
"""
