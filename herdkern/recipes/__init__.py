"""Recipes: functions that return all settings of a run, by the name that `herdkern run` takes."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from herdkern.recipes.config import Recipe

RECIPES = {  # name: (module, function, what it is)
    "demo": ("demo", "demo", "this Python's documentation, crawled, cleaned and learned by 5 M parameters; minutes"),
    "llama3-8b": ("llama3", "recipe_8b", "Llama 3 8B: 15.6 T tokens of your own records"),
    "llama3-70b": ("llama3", "recipe_70b", "Llama 3 70B: the same"),
    "llama3-405b": ("llama3", "recipe_405b", "Llama 3 405B: the same"),
}


def load_recipe(name: str) -> "Recipe":
    """The settings of the recipe called `name`.

    Raises: ValueError if there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"load_recipe: name must be one of {', '.join(RECIPES)}, got {name!r}")
    module, function, _ = RECIPES[name]
    make: Callable[[], Recipe] = getattr(importlib.import_module(f"herdkern.recipes.{module}"), function)
    return make()
