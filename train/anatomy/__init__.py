"""Analyses what a trained run learned, as numbers, figures and a page: python -m train.anatomy RUN."""
