"""Grids of coefficients, searches, strengths of a negation: many points scored in one process."""
