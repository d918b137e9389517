"""What a user can get wrong about a run. The message is one sentence; commands exit with code 2."""


class RunError(ValueError):
    """A recipe, its data, a checkpoint or the machine does not allow the run."""


class RecipeError(RunError):
    """The recipe itself is wrong."""
