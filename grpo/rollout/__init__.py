"""vLLM: the only package that imports it. `engine.py` is the face; `build.py` and what it needs load vLLM.

Importing this package or `engine.py` loads neither torch nor vLLM: the environment must be set before they are loaded.
"""
