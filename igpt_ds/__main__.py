"""python -m igpt_ds, and what `deepspeed --module igpt_ds` starts on every rank."""

from igpt_ds.cli import main

main()
