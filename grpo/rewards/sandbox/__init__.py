"""Runs the user's functions in a process that cannot hurt the run. Imports nothing but the standard library.

`supervisor` starts one `worker`, counts with `usage` what it takes, and ends it with everything that it started;
`landlock`, `seccomp` and `limits` are the fences that the worker puts around itself before it imports user code.
`rewards` is the only caller.
"""
