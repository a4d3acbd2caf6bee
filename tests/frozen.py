"""Makes a process of the tests cheaper, once what it needs is imported. Imported last by the one that forks come from.

Imports leave a million objects, hardly one of which is garbage: looking through them took half a second each time, and
in a fork a copy of their memory. And no test cuts the power: that files reach the disk one by one is only waited for.
"""

import gc
import os

gc.freeze()
os.fsync = lambda descriptor: None
