"""What a completion is worth: the built-in rewards are in `built_in`, any other is `module:function` of the user.

It imports nothing: a fenced process (`sandbox/`) starts through it.
"""
