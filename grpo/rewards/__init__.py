"""What a completion is worth: built in are `gsm8k` and `boxed`, any other is `module:function` of the user.

It imports nothing: a fenced process (`sandbox/`) starts through it.
"""
