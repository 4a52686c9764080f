"""A recipe as the command line that runs it."""

from __future__ import annotations

import shlex
from pathlib import Path

from sdopt.model.recipe import BuildRecipe


def rebuild_command(recipe: BuildRecipe, folder: Path) -> str:
    """The command line that makes a bundle again; settings that have no option are left to the recipe's defaults."""
    flags = {"target": recipe.target, "precision": recipe.precision, "size": recipe.size, "batch": recipe.batch,
             "tokens": recipe.tokens, "vae": recipe.vae, "max_memory": recipe.max_memory}  # fmt: skip
    defaults = BuildRecipe()
    words = ["sdopt", "convert", recipe.source, "-o", str(folder)]
    for name, value in flags.items():
        if value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if recipe.require_fused:
        words.append("--require-fused")
    return shlex.join(words if recipe.verify.enabled else [*words, "--no-verify"])
