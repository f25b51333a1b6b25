"""Imported before what takes seconds to import, so that Ctrl-C during it ends a rank at once and without a traceback.

`budget.Budget` takes Ctrl-C over once training begins.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
