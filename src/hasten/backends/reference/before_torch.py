"""Imported before torch is: how its threads wait.

OpenMP's threads spin at the end of every parallel loop. On a machine that does something else besides, a spinning thread keeps the
working one off its core: decoding code-8m beside two busy processes took 40 s so, and 3 s with threads that sleep. An environment that
says otherwise is left alone.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
