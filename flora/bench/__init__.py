"""Measurements: systems in turns, in one run, with the machine and the versions beside them."""
