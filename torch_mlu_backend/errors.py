"""The one exception type for what a person can put right."""


class UserError(ValueError):
    """Wrong use, a bad file or a missing device. The message names it and the remedy; the command line prints that alone."""
