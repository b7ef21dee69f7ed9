"""The ops as Triton kernels for NVIDIA GPUs, one file for each op; loaded by the first call that needs it.

Each file holds the kernels, the functions that launch them, and their registration with torch under names of their own.
Arguments are checked by herdkern/ops/<op>.py. Compiled ahead of time for four GPUs and run by Triton's interpreter;
docs/gpu.md says what that proves.
"""
