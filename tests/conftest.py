"""One thread a process: tiny models gain nothing from more, and tests run side by side. No test fails by being slow."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
