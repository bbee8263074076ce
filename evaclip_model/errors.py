"""The one error a user can cause, by input that its author can mend (a recipe key, a file, a port).
Bugs stay ordinary exceptions with their traceback."""


class InputError(ValueError):
    """One sentence for the user: which file, row or field, what was expected, what to do.

    Command lines print the sentence alone and exit with status 2.
    """
