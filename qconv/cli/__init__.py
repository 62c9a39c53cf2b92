"""The command line: one module a command. Click is imported here alone.

NumPy's BLAS gets one thread, which it reads from the environment when it is imported: of the small products of this
work, threads that wait for each other take more time than they save, and sums would depend on the number of cores. Who
sets the variables is heard.
"""

import os

for _variable in ("OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_variable, "1")
