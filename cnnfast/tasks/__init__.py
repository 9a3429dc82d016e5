"""Whole jobs on top of the library, for the command line. Nothing of the library imports them."""
