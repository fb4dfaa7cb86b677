"""Triton programs: plain functions of pointers, sizes and strides. Importing one needs Triton.

Launched by the module of the same name one level up, which says what they compute. Not type-checked: this
is Triton's language, not Python.
"""
