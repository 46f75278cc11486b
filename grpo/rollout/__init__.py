"""vLLM: an engine that completes prompts and takes new weights; the only room that imports vLLM.

`engine.py` is the face; `build.py` and what it needs load vLLM. Importing this room or `engine.py` loads neither torch
nor vLLM: the environment must be set before they are loaded.
"""
