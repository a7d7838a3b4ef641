"""`python -m recattn check`: does every operator compute the right numbers on this device?

cases.py       the problems: each operator's inputs, small and odd, ragged, real
worker.py      one process: an operator in one dtype, each implementation against the float64 reference
supervisor.py  starts the processes, and reports the case in which one crashes or hangs
report.py      the table on the screen, and the JSON file to attach to a bug report
command.py     the arguments
"""
