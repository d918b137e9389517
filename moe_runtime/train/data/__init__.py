"""What a training reads: samples from files, packed into rows whose documents do not see each other."""

from .recipe import DataRecipe

__all__ = ["DataRecipe"]
