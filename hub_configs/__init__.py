"""Recipes and templates: data, no code."""
