"""vLLM: an engine that completes prompts and takes new weights, and what collects the batches; alone in importing vLLM.

`engine.py` is the engine's face; `build.py` and what it needs load vLLM. Importing this room or `engine.py` loads
neither torch nor vLLM: the environment must be set before they are loaded.
"""
