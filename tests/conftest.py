"""Settings that must be made before torch is imported."""

import os

# pytest-xdist runs one worker a core; a second thread in each would only wait for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what reaches for the Hub says so itself
