"""The one error that users are meant to read."""


class PemlError(ValueError):
    """A mistake in what the user gave: one sentence that names the file, key or task and says what to do.

    The command line prints it without a traceback and exits with code 2. Broken promises inside the package
    are assertions instead.
    """
