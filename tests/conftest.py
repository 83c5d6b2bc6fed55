import os

# The models here are tiny: more threads only wait for each other. Programs that tests start take this over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
