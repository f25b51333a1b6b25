"""What the command line does between its arguments and its output.

options   the arguments, read and checked without torch
progress  what is being done, on standard error
command   build, trace, solve
edges     the costs of reshards, as matrices
report    a plan, as text and as JSON
"""
