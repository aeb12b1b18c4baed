"""Hostile bytes: every decoder is given inputs that nobody honest would send.

`python -m tests.fuzz --inputs N --seed S [--target NAME]` runs the mutation fuzzer, and a short run of each target is
an ordinary test (test_short_run.py). test_structured.py holds what hypothesis makes from the shape of the messages.
"""
