"""The one error that a user can cause, and text that is safe to print."""


def printable(text) -> str:
    """`text` with control characters and undecodable bytes escaped, safe to print whatever a file is called."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InputError(ValueError):
    """The user's input is at fault. The message is one line that names the file or flag and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def reason_of(error: BaseException, length: int = 200) -> str:
    """The message of another library's exception on one line of at most `length` characters, or its type."""
    return printable(" ".join(str(error).split())[:length]) or type(error).__name__
