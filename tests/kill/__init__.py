"""Sudden death: every script that writes is killed at random instants, and what it leaves is looked at.
python -m tests.kill --help"""
