"""What a user of this package can get wrong. The message is one sentence; commands exit with code 2."""


class UpcycleError(ValueError):
    """A recipe, a checkpoint or the machine does not allow the run; nothing was left behind."""


class RecipeError(UpcycleError):
    """The recipe itself is wrong."""
