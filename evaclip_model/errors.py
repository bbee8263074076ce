"""The one error a user can cause, by input that its author can mend (a recipe key, a file, a port).
Bugs stay ordinary exceptions with their traceback."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that move a terminal's cursor or turn the direction of text; not tab and line feed."""
_MOST_CHARS = 8000


class InputError(ValueError):
    """One sentence for the user: which file, row or field, what was expected, what to do. Command
    lines print it alone and exit with status 2. Wherever it is shown it has no control characters,
    and of names without end their beginning.
    """

    def __init__(self, sentence: str) -> None:
        if len(sentence) > _MOST_CHARS:
            sentence = f"{sentence[: _MOST_CHARS // 2]} … {sentence[-_MOST_CHARS // 4 :]}"
        super().__init__(escape_control(sentence))


def escape_control(text: str) -> str:
    """`text` with every control character as it is written in Python: a name or caption of others
    must not move the cursor, recolour the terminal or turn text round."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def shorten_error(error: Exception) -> str:
    """The first line of a library's error, at most 200 characters; its class if it has no text."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is not UTF-8: save it as UTF-8"
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
