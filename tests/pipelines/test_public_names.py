"""Recipes are written as a user writes: they import ncbatch as nc, and nothing from inside of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ncbatch as nc

RECIPES = ("digits", "hf_layerwise", "plots", "tiny_gpt", "tiny_lm")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_use_public_names_only(recipe: str):
    text = (Path(__file__).parents[2] / "pipelines" / f"{recipe}.py").read_text("utf-8")
    assert not re.search(r"(from|import) ncbatch\.|from ncbatch ", text)
    assert set(re.findall(r"\bnc\.(\w+)", text)) <= set(nc.__all__)
