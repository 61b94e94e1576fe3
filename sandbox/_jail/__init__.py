"""The processes that make and hold a jail: zygote, builder, pid 1. Standard library and `_linux` only.

Nothing here decides. The plan arrives as JSON on an inherited descriptor and is walked step by step; a step that
fails is reported by name with its errno, and the jail ends before anything of the tool has run.
"""
