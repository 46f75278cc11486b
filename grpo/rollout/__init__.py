"""vLLM: the only floor that imports it. `engine.py` is the face; `build.py` and what it needs import vLLM.

Importing this package or `engine.py` imports neither torch nor vLLM, because the environment must be set before they load.
"""
