"""The checks of each step, in one file per step.

A file lists its checks in CHECKS. A check is a function of the reader's module, and its docstring says what
it tests. It raises CheckError if the reader's code is wrong, and may return a line with what it measured.
"""
