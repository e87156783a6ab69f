"""Mutated inputs: every file and flag that the scripts read, changed at random, must be accepted or refused in one
sentence.  python -m tests.fuzz --help"""
