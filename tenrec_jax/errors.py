"""The one exception type for what a person can put right."""


class UserError(ValueError):
    """Wrong use or bad input. The message names the file, line, column or key, and the remedy.

    The command line prints the message alone and exits with code 2; anything else is a defect and keeps its traceback.
    """
