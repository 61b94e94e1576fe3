"""Detectors: pure functions from what was seen of a call to findings that explain themselves.

A finding is evidence. Only a breach of the manifest ends a call; suspicion never does by itself.
"""
