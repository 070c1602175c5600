"""Evaluations, and what they need to judge an answer."""
