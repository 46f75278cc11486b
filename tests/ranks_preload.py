"""Imported once by the fork server of `ranks.py`; its children find everything loaded."""

import gc
import os

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import deepspeed  # noqa: E402, F401

import grpo.trainer  # noqa: E402, F401

gc.freeze()  # DeepSpeed collects garbage at each start at stage 3, and need not look at all of this
