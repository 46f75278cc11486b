"""Imported once by the fork server of `ranks.py`; its children find everything loaded."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import deepspeed  # noqa: E402, F401

import grpo.trainer  # noqa: E402, F401
