"""`python -m data_prep` is `igpt-data`."""

from data_prep.cli import main

main()
