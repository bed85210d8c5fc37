"""The one exception for bad input: what a user can mend, told in one line."""


class UserError(Exception):
    """Bad input: the message names the thing, what is wrong with it and what to do, in one line.

    The command lines print it on stderr and exit with status 2; any other exception is a fault of the
    run and exits with status 1. Any public function may raise it for bad input: a docstring names it only
    where that is not plain from the arguments. Standard library only, so that the format modules can raise it.
    """


class RunError(Exception):
    """A fault of the run itself that one line explains (a loss that is not finite, say): exit status 1."""
