"""The one error a user can cause, by input that its author can mend (a recipe key, a file, a port).
Bugs stay ordinary exceptions with their traceback."""


class InputError(ValueError):
    """One sentence for the user: which file, row or field, what was expected, what to do. Command
    lines print it alone and exit with status 2."""


def shorten_error(error: Exception) -> str:
    """The first line of a library's error, at most 200 characters; its class if it has no text."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
