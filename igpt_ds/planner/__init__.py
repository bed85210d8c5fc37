"""What a training will need before a GPU is used: memory, messages, time. Pure arithmetic, without torch.

    layout.py          configuration + DeepSpeed configuration + GPUs -> who holds what
    devices.py         data sheets
    memory.py          bytes of one rank by kind
    gathering.py       which weights ZeRO-3 gathers, and how many it holds
    communication.py   bytes that one rank sends in a step, by operation
    kernels.py         how long a GPU computes on a step
    step_time.py       how long a step takes, by a stated model
    choose.py          what the machine decides: the way to run a job that fits and is fastest
    advice.py          what limits, and what would be faster or would fit
    report.py          all of it, as JSON and as tables

Figures that the arithmetic fixes (parameters, FLOPs, model states, message sizes) are tested against the real network
and DeepSpeed; times rest on assumptions, which docs/plan.md lists.
"""
