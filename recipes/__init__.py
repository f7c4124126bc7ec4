"""Recipes and prompts that ship with mskip (data, no code)."""
