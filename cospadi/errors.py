"""The one exception that means "the person running this can mend it"."""


class UserError(ValueError):
    """A mistake in settings or input: one sentence saying what, why and how to mend.

    The command line prints the sentence and exits with 1; everything else keeps its traceback.
    """
