"""Evaluations that can be interrupted and go on: units of work, their journal, what is watched."""
